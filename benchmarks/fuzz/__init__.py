"""Random requests, well-formed and not, against a server with faults in it: see __main__.py."""
