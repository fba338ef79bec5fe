"""The control plane: configuration, launching, supervision, and the `tandem` command. Serves no request itself."""
