"""The extras that users may install, and how."""

EXTRAS = {  # what each is for, and the modules that it needs; those for developers are left out
    "peer": ("peer: stores, serve and certificates", ("cryptography",)),
    "nixl": ("nixl: stores", ("nixl", "cryptography")),
    "valkey": ("valkey: stores", ("glide_sync", "cryptography")),
    "s3": ("s3: stores", ("obstore", "cryptography")),
    "mooncake": ("mooncake: stores", ("mooncake", "cryptography")),
    "metrics": ("serve --metrics", ("prometheus_client",)),
    "demo": ("examples/demo.py", ("transformers", "torchvision", "PIL", "skimage", "rich")),
    "completion": ("completion of commands in a shell", ("argcomplete",)),
}


def how_to_install(extra: str = "") -> str:
    """What to type, and where, to install the package (again), with an extra. Without -e, pip would replace the clone
    that Python imports by a copy of it."""
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install -e {what} in the clone"
