"""Work that is shared by the devices of one machine, and by several machines."""
