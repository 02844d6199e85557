"""Where adapter versions go on the device: slots, bytes, order of loads."""
