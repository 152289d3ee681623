"""What stands between the network and the service: keys, hosts, bodies, paths, templates."""
