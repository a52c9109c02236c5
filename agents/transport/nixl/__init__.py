"""The NIXL transport: endpoints, edges, writes."""
