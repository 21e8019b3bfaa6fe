"""Commands of `pmlm` that are not library functions, one file each."""
