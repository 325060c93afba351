"""Known GPUs: what their makers say of speed and memory. Nothing here asks a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A row of the table: peak in TFLOP/s, dense, of matrix products in `dtype`; memory in GB."""

    name: str
    peak: float
    memory: float
    dtype: str = "bfloat16"
    # What the driver's name of the device contains, where that is not `name`.
    device_name: str = ""

    @property
    def flops(self) -> float:
        """The peak in FLOP/s."""
        return self.peak * 1e12

    @property
    def bytes(self) -> float:
        """The memory in bytes; the GB of a data sheet are taken for 10^9, the lesser reading."""
        return self.memory * 1e9


# Data sheets' figures for tensor cores, without sparsity and accumulating in float32; T4 and V100
# have no bfloat16. A device is the first row whose name its own contains, so L40S is before L4.
GPUS = (
    Gpu("T4", 65, 16, "float16"),
    Gpu("V100 16 GB", 125, 16, "float16", device_name="V100-SXM2-16GB"),
    Gpu("V100 32 GB", 125, 32, "float16", device_name="V100"),
    Gpu("RTX 3090", 71, 24),
    Gpu("RTX 4090", 165, 24),
    Gpu("A10G", 70, 24),
    Gpu("L40S", 362, 48),
    Gpu("L40", 181, 48),
    Gpu("L4", 121, 24),
    Gpu("A100 40 GB", 312, 40, device_name="A100-SXM4-40GB"),
    Gpu("A100 80 GB", 312, 80, device_name="A100"),
    Gpu("H100 PCIe", 756, 80),
    Gpu("H100", 989, 80),
    Gpu("H200", 989, 141),
    Gpu("B200", 2250, 180),
)


def find_gpu(device_name: str) -> Gpu | None:
    """Return the row of a device, by the name its driver gives it; None where it is not known."""
    return next((gpu for gpu in GPUS if (gpu.device_name or gpu.name) in device_name), None)
