"""Document filters: Unicode normalization, language, duplicates, held-out texts."""
