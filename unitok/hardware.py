"""What accelerators can do, by their makers' data sheets."""

#: Peak FLOPs a second in bf16, dense, by the part of the device's name that tells it.
HARDWARE = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l40s": 362e12, "rtx4090": 165e12}


def peak_flops(device_name: str) -> float | None:
    """Of a device as the driver names it ("NVIDIA H100 80GB HBM3"); None where it is not known."""
    name = device_name.lower().replace(" ", "")
    return next((flops for key, flops in HARDWARE.items() if key in name), None)
