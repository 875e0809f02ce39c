"""Programs of back ends that read the broker's streams themselves."""
