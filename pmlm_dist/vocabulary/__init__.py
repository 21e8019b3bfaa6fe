"""WordPiece vocabularies: files, training, tokenization."""
