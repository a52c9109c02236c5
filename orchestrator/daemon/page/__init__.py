"""The operator's page: static files, a stream of what is, and what the page asks for besides."""
