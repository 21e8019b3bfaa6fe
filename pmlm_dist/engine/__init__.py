"""DeepSpeed: configuration, engine, optimizer and the extension it compiles."""
