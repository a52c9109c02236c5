"""See README.md beside this folder."""
