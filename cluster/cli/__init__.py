"""The `tandem` command. `app` starts and ends clusters; the others have commands of one kind, or what they show."""
