"""RQ as we use it: queues that run only our functions, tries again, limits, hosts.."""
