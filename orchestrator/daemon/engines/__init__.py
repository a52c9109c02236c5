"""Calls to inference engines' admin routes."""
