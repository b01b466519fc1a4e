"""The protocol as pure state machines: events in, instructions out; no clock, socket, thread or tensor."""
