"""DeepSpeed: its JSON, its engine, the optimizer and what it compiles."""
