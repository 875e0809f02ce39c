"""What runs beside the gateways: consumers of what devices say, the clocks, and the event log."""
