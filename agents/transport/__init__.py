"""How weight bytes move from trainer slots to inference targets."""
