"""Process groups and the sharded layers: parallelism has one address."""

import warnings

with warnings.catch_warnings():  # megatron-core tells at import which optional kernels it lacks; none is used here
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core.tensor_parallel  # noqa: F401
