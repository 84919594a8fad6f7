"""From a client's words to rows and back: validation, tokens, streams, the engine loop."""
