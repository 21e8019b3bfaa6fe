"""Other systems' formats: weights out to them, and in from them."""
