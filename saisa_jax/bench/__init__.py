"""What parts of the program cost, measured on this machine."""
