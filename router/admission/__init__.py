"""Who may enter, and in what order the cluster is asked."""
