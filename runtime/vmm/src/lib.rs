//! Our own machine over any hypervisor.
