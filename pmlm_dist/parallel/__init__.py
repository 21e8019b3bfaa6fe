"""Process groups, sharded layers, collective operations and seeds: all code that depends on a rank's place."""

import warnings

with warnings.catch_warnings():  # megatron-core warns at import about optional kernels, which are not used here
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core.tensor_parallel  # noqa: F401
