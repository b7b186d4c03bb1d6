"""How weights travel into an engine, and how their arrival is proved."""
