//! The backend chosen at compile time.
//!
//! The one place that turns features and targets into a type. With no backend chosen `Native` is not defined, so that
//! libraries build and test everywhere; the binary says what to pick.
#![forbid(unsafe_code)]

cfg_if::cfg_if! {
    if #[cfg(not(feature = "kvm"))] {
    } else if #[cfg(not(target_os = "linux"))] {
        compile_error!("feature `kvm` needs a Linux target; build without it, and machines are run by QEMU");
    } else if #[cfg(not(target_arch = "x86_64"))] { // ARCH: the KVM backend has x86_64 guests only
        compile_error!("feature `kvm` has x86_64 only so far; build without it, and machines are run by QEMU");
    } else {
        /// The hypervisor of this build.
        pub type Native = caisson_hal_kvm::Kvm;
    }
}
