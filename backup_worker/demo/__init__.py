"""A real small fleet that lives through everything this product is for: `backup-worker demo`."""
