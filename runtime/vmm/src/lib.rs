//! Our own machine: bus, vCPU threads, loader; generic over the hypervisor.
