"""The `fusionrag` command: thin commands over `index`, `fusionrag` and `server`."""
