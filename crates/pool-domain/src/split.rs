//! Which layers of a model go to which device.
