//! The eBPF program that decides which devices a container may use
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller").
//!
//! Rules are OCI's, of which later ones win. A request asks for several kinds of access at once, and each of
//! them may be decided by another rule: the program goes through the rules from the last to the first,
//! strikes out what is allowed, and refuses at the first rule that denies something not struck out yet.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

/// The program for the devices that `resources` lists and those that every container may use.
pub(crate) fn program(resources: Option<&LinuxResources>) -> Vec<u64> {
    let listed = resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default();
    let rules: Vec<Rule> = listed.iter().filter_map(Rule::of).chain(ALWAYS).collect();
    assemble(&rules)
}

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `BPF_DEVCG_DEV_*`; `None` is every type.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    /// `BPF_DEVCG_ACC_*`.
    access: i32,
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Option<Self> {
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::P => return None, // a FIFO is no device to this controller
        };
        // -1 and other negative numbers stand for every number.
        let number = |number: Option<i64>| number.and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0);
        let access = match rule.access().as_deref() {
            None | Some("") => READ | WRITE | MKNOD,
            Some(letters) => letters.chars().fold(0, |access, letter| {
                access
                    | match letter {
                        'r' => READ,
                        'w' => WRITE,
                        'm' => MKNOD,
                        _ => 0,
                    }
            }),
        };
        Some(Self {
            allow: rule.allow(),
            kind,
            // "All types" has no numbers: as in cgroup v1, it is about every device.
            major: kind.and(number(rule.major())),
            minor: kind.and(number(rule.minor())),
            access,
        })
    }
}

const fn allow(major: i32, minor: Option<i32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: READ | WRITE | MKNOD,
    }
}

const fn make_nodes(kind: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        access: MKNOD,
    }
}

/// What every container may use: the default devices and terminals; and nodes may be made of all, since that
/// alone opens none.
const ALWAYS: [Rule; 11] = [
    make_nodes(CHARACTER),
    make_nodes(BLOCK),
    allow(1, Some(3)), // null
    allow(1, Some(5)), // zero
    allow(1, Some(7)), // full
    allow(1, Some(8)), // random
    allow(1, Some(9)), // urandom
    allow(5, Some(0)), // tty
    allow(5, Some(1)), // console
    allow(5, Some(2)), // ptmx
    allow(136, None),  // pts
];

/// Registers: the context comes in 1, the result goes out in 0; 2 holds the type, 3 what is still asked for,
/// 4 and 5 the numbers, 6 is scratch.
fn assemble(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        // `struct bpf_cgroup_dev_ctx`: access in the high and type in the low half, then major and minor.
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOVE_REG, 3, 2, 0, 0),
        insn(AND, 2, 0, 0, 0xffff),
        insn(SHIFT_RIGHT, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let decision = if rule.allow {
            vec![
                insn(AND, 3, 0, 0, !rule.access),
                insn(JUMP_NOT_EQUAL, 3, 0, 2, 0),
                insn(MOVE, 0, 0, 0, 1),
                insn(EXIT, 0, 0, 0, 0),
            ]
        } else {
            vec![
                insn(MOVE_REG, 6, 3, 0, 0),
                insn(AND, 6, 0, 0, rule.access),
                insn(JUMP_EQUAL, 6, 0, 2, 0),
                insn(MOVE, 0, 0, 0, 0),
                insn(EXIT, 0, 0, 0, 0),
            ]
        };
        let checks = [(2, rule.kind), (4, rule.major), (5, rule.minor)];
        let mut left = checks.iter().filter(|(_, value)| value.is_some()).count();
        for (register, value) in checks {
            if let Some(value) = value {
                left -= 1;
                let over = i16::try_from(left + decision.len()).unwrap_or_default();
                code.push(insn(JUMP_NOT_EQUAL, register, 0, over, value));
            }
        }
        code.extend(decision);
    }
    code.extend([insn(MOVE, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    code
}

/// `struct bpf_insn`, include/uapi/linux/bpf.h, in the bytes of this machine.
fn insn(opcode: u8, target: u8, source: u8, offset: i16, value: i32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [v0, v1, v2, v3] = value.to_ne_bytes();
    u64::from_ne_bytes([opcode, source << 4 | target, o0, o1, v0, v1, v2, v3])
}

/// include/uapi/linux/bpf.h.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
/// Opcodes; arithmetic and jumps on 32 bits, but for `JUMP_*`, whose registers hold 32-bit values.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb4;
const MOVE_REG: u8 = 0xbc;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would, for one request.
    fn allowed(code: &[u64], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i32; 8];
        let mut at = 0;
        loop {
            let [opcode, pair, o0, o1, v0, v1, v2, v3] = code[at].to_ne_bytes();
            let (target, source) = (usize::from(pair & 0xf), usize::from(pair >> 4));
            let offset = i16::from_ne_bytes([o0, o1]);
            let value = i32::from_ne_bytes([v0, v1, v2, v3]);
            at += 1;
            match opcode {
                LOAD_WORD => registers[target] = context[usize::try_from(offset / 4).unwrap()],
                MOVE => registers[target] = value,
                MOVE_REG => registers[target] = registers[source],
                AND => registers[target] &= value,
                SHIFT_RIGHT => registers[target] >>= value,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {
                    if (registers[target] == value) == (opcode == JUMP_EQUAL) {
                        at += usize::try_from(offset).unwrap();
                    }
                }
                EXIT => return registers[0] != 0,
                other => panic!("unknown opcode {other:#x}"),
            }
        }
    }

    fn resources(devices: &str) -> LinuxResources {
        serde_json::from_str(&format!("{{\"devices\": {devices}}}")).unwrap()
    }

    #[test]
    fn without_rules_only_the_default_devices_may_be_used() {
        let code = program(None);
        for (kind, major, minor, access, want) in [
            (CHARACTER, 1, 3, READ | WRITE, true),
            (CHARACTER, 136, 7, READ | WRITE, true),
            (CHARACTER, 1, 1, READ, false), // /dev/mem
            (CHARACTER, 1, 1, MKNOD, true),
            (CHARACTER, 1, 1, MKNOD | READ, false),
            (BLOCK, 254, 0, READ, false),
            (BLOCK, 254, 0, MKNOD, true),
        ] {
            assert_eq!(
                allowed(&code, kind, major, minor, access),
                want,
                "{kind} {major}:{minor} {access}"
            );
        }
    }

    #[test]
    fn later_rules_win_and_kinds_of_access_are_decided_one_by_one() {
        let code = program(Some(&resources(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "w"},
                {"allow": true, "type": "b", "major": 8, "access": "rw"},
                {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"}]"#,
        )));
        for (kind, major, minor, access, want) in [
            (CHARACTER, 10, 229, READ | WRITE, true),
            (CHARACTER, 10, 229, READ | WRITE | MKNOD, true),
            (CHARACTER, 10, 230, READ, false),
            (BLOCK, 8, 0, READ | WRITE, true),
            (BLOCK, 8, 1, READ, true),
            (BLOCK, 8, 1, READ | WRITE, false),
        ] {
            assert_eq!(
                allowed(&code, kind, major, minor, access),
                want,
                "{kind} {major}:{minor} {access}"
            );
        }
    }

    #[test]
    fn a_rule_for_all_types_is_about_every_device() {
        let code = program(Some(&resources(
            r#"[{"allow": true, "type": "a", "major": 1, "access": "rwm"}]"#,
        )));
        assert!(allowed(&code, BLOCK, 254, 3, READ | WRITE | MKNOD));
    }
}
