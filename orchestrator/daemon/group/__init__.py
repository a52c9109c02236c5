"""Rendezvous over vLLM's StatelessProcessGroup (``rendezvous: tcpstore``)."""
