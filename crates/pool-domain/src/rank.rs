//! Which replica serves a request best, and why the others do not.
