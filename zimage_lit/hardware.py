"""What GPUs can do at best, as their vendors say."""

# TFLOP/s of matrix products in bfloat16, summed in float32, without sparsity, from the vendors' data sheets. The first
# entry of which every word is in the device's name (in small letters) counts.
PEAK_TFLOPS: list[tuple[tuple[str, ...], float]] = [
    (("gb200",), 2500.0),
    (("b200",), 2250.0),
    (("h200", "nvl"), 835.5),
    (("h200",), 989.5),
    (("h100", "nvl"), 835.5),
    (("h100", "pcie"), 756.0),
    (("h100",), 989.4),
    (("a100",), 312.0),
    (("a800",), 312.0),
    (("l40s",), 362.05),
    (("l40",), 181.05),
    (("l4",), 121.0),
    (("a40",), 149.7),
    (("rtx 5090",), 209.5),
    (("rtx 4090",), 165.2),
    (("rtx 3090",), 71.0),
    (("mi325x",), 1307.4),
    (("mi300x",), 1307.4),
    (("mi250x",), 383.0),
]


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bfloat16 of the device that torch names so; None where the table does not know it.

    A part of a GPU (MIG) has no figure: what it can do is not in its name.
    """
    name = device_name.lower()
    if " mig " in f" {name} ":
        return None
    words = name.replace("-", " ").split()
    for wanted, tflops in PEAK_TFLOPS:
        if all(set(entry.split()) <= set(words) for entry in wanted) and not {"laptop", "ti", "d"} & set(words):
            return tflops * 1e12
    return None
