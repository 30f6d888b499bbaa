"""What we lean on in other libraries without its being part of their interface: a file for each library."""
