//! A small assembler for seccomp's classic BPF (Documentation/userspace-api/seccomp_filter.rst).

use std::ops::RangeInclusive;

use libc::sock_filter;
use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator as Op};

/// Offset of the call's number in `struct seccomp_data`, include/uapi/linux/seccomp.h.
pub(super) const NUMBER_OFFSET: u32 = 0;
/// Offset of the architecture.
pub(super) const ARCH_OFFSET: u32 = 4;
/// Offset of the first of six 64-bit arguments.
const ARGUMENTS_OFFSET: u32 = 16;

/// Instructions under construction.
#[derive(Clone, Debug, Default)]
pub(super) struct Program(Vec<sock_filter>);

impl Program {
    /// The instructions.
    pub(super) fn finish(self) -> Vec<sock_filter> {
        self.0
    }

    /// Loads the word at `offset`.
    pub(super) fn load(&mut self, offset: u32) {
        self.push(LOAD, 0, 0, offset);
    }

    /// Ends with `action`.
    pub(super) fn ret(&mut self, action: u32) {
        self.push(RETURN, 0, 0, action);
    }

    /// Runs `body`, which must end by itself, if the loaded word is `audit`; keeps the word otherwise.
    pub(super) fn section(&mut self, audit: u32, body: &Program) {
        self.when_number(audit, body);
    }

    /// Runs `body`, which must end by itself, if the loaded word is `number`.
    pub(super) fn when_number(&mut self, number: u32, body: &Program) {
        // Conditional jumps reach 255 instructions only, hence the unconditional one.
        self.push(EQUAL, 1, 0, number);
        self.push(JUMP, 0, 0, u32::try_from(body.0.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(&body.0);
    }

    /// Ends with `action` if the loaded word is `number` or greater.
    pub(super) fn when_from(&mut self, number: u32, action: u32) {
        self.push(AT_LEAST, 0, 1, number);
        self.ret(action);
    }

    /// Ends with `action` if the loaded word is in `range`.
    pub(super) fn when_in(&mut self, range: RangeInclusive<u32>, action: u32) {
        if range.start() == range.end() {
            self.push(EQUAL, 0, 1, *range.start());
        } else {
            self.push(AT_LEAST, 0, 2, *range.start());
            self.push(GREATER, 1, 0, *range.end());
        }
        self.ret(action);
    }

    /// Ends with `action` if all conditions hold; overwrites the loaded word.
    pub(super) fn when_all(&mut self, conditions: &[&LinuxSeccompArg], action: u32) {
        let steps: Vec<Step> = conditions.iter().flat_map(|condition| steps(condition)).collect();
        let count = steps.len();
        for (index, step) in steps.into_iter().enumerate() {
            // To behind the `ret` that follows the steps. Six conditions have 36 steps at most.
            let fail = u8::try_from(count - index).unwrap_or(u8::MAX);
            let resolve = |target| match target {
                Target::Ahead(distance) => distance,
                Target::Fail => fail,
            };
            self.push(step.code, resolve(step.yes), resolve(step.no), step.value);
        }
        self.ret(action);
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.0.push(sock_filter { code, jt, jf, k });
    }
}

/// Where a step goes on.
#[derive(Clone, Copy)]
enum Target {
    /// That many instructions further than the next.
    Ahead(u8),
    /// Behind the rule.
    Fail,
}

struct Step {
    code: u16,
    yes: Target,
    no: Target,
    value: u32,
}

/// Compares a 64-bit argument, of which the machine sees one half at a time.
fn steps(condition: &LinuxSeccompArg) -> Vec<Step> {
    use Target::{Ahead, Fail};
    let low_at = ARGUMENTS_OFFSET + 8 * u32::try_from(condition.index()).unwrap_or_default();
    let plain = |code, value| Step {
        code,
        yes: Ahead(0),
        no: Ahead(0),
        value,
    };
    let jump = |code, value, yes, no| Step { code, yes, no, value };
    let (high, low) = halves(condition.value());
    let (load_high, load_low) = (plain(LOAD, low_at + 4), plain(LOAD, low_at));
    match condition.op() {
        Op::ScmpCmpEq => vec![
            load_high,
            jump(EQUAL, high, Ahead(0), Fail),
            load_low,
            jump(EQUAL, low, Ahead(0), Fail),
        ],
        Op::ScmpCmpNe => vec![
            load_high,
            jump(EQUAL, high, Ahead(0), Ahead(2)),
            load_low,
            jump(EQUAL, low, Fail, Ahead(0)),
        ],
        Op::ScmpCmpGt => above(load_high, load_low, high, jump(GREATER, low, Ahead(0), Fail)),
        Op::ScmpCmpGe => above(load_high, load_low, high, jump(AT_LEAST, low, Ahead(0), Fail)),
        Op::ScmpCmpLt => below(load_high, load_low, high, jump(AT_LEAST, low, Fail, Ahead(0))),
        Op::ScmpCmpLe => below(load_high, load_low, high, jump(GREATER, low, Fail, Ahead(0))),
        Op::ScmpCmpMaskedEq => {
            let wanted = condition.value_two().unwrap_or_default() & condition.value();
            let (wanted_high, wanted_low) = halves(wanted);
            vec![
                load_high,
                plain(AND, high),
                jump(EQUAL, wanted_high, Ahead(0), Fail),
                load_low,
                plain(AND, low),
                jump(EQUAL, wanted_low, Ahead(0), Fail),
            ]
        }
    }
}

/// The high half decides unless it is equal.
fn above(load_high: Step, load_low: Step, high: u32, last: Step) -> Vec<Step> {
    let greater = Step {
        code: GREATER,
        yes: Target::Ahead(3),
        no: Target::Ahead(0),
        value: high,
    };
    let equal = Step {
        code: EQUAL,
        yes: Target::Ahead(0),
        no: Target::Fail,
        value: high,
    };
    vec![load_high, greater, equal, load_low, last]
}

/// The high half decides unless it is equal.
fn below(load_high: Step, load_low: Step, high: u32, last: Step) -> Vec<Step> {
    let greater = Step {
        code: GREATER,
        yes: Target::Fail,
        no: Target::Ahead(0),
        value: high,
    };
    let equal = Step {
        code: EQUAL,
        yes: Target::Ahead(0),
        no: Target::Ahead(2),
        value: high,
    };
    vec![load_high, greater, equal, load_low, last]
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

/// Opcodes, include/uapi/linux/bpf_common.h: `BPF_LD | BPF_W | BPF_ABS` and so on.
const LOAD: u16 = 0x20;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const AT_LEAST: u16 = 0x35;
const AND: u16 = 0x54;

/// What a program returns for a call: the machine in small, for what a test cannot try on the kernel.
#[cfg(test)]
pub(super) fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = vec![number, arch, 0, 0];
    for argument in arguments {
        let (high, low) = halves(argument);
        data.extend([low, high]);
    }
    let (mut word, mut at) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
        match step.code {
            LOAD => word = data[usize::try_from(step.k / 4).unwrap()],
            AND => word &= step.k,
            JUMP => at += usize::try_from(step.k).unwrap(),
            EQUAL => at += jump(word == step.k),
            GREATER => at += jump(word > step.k),
            AT_LEAST => at += jump(word >= step.k),
            RETURN => return step.k,
            other => panic!("unknown opcode {other:#x}"),
        }
    }
}
