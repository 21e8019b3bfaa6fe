"""Filters of documents: normalisation, language, duplicates, held-out texts."""
