"""How fast a model generates here, alone or interleaved with a peer; what `octavo bench` prints."""
