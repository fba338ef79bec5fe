"""What each tenant may use of the cluster: requests and tokens per minute, requests at once, over all gateways."""
