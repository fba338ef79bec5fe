"""Wire contracts of Tandem: `.proto` files, their generated stubs (committed, checked for drift) and `codec`."""
