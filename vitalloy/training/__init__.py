import vitalloy._torchvision  # noqa: F401  must run before timm is imported
