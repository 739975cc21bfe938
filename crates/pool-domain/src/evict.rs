//! Which idle replicas give way so that a start fits.
