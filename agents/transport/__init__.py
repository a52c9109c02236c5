"""How weight bytes move from trainer slots to inference targets: one interface, one module or folder a transport."""
