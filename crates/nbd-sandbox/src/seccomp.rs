//! Seccomp: restricts the system calls that remain available.
//!
//! A call that isn't listed fails with `ENOSYS`, as on a kernel that lacks it. A C library that
//! tries a newer call falls back to an older one, and a call that was forgotten here is an error in
//! the log, not the end of the program. Calls that only an attacker would make kill the process.
//!
//! Calls made for every read have no conditions on their arguments, because the kernel caches the
//! result for those and doesn't run the filter: replies are sent with `writev`. `sendto` is used
//! only for negotiation, so its arguments are checked.
//!
//! Sockets can send only to the peer that they are connected to. `sendmsg` and `recvmsg` aren't
//! listed, since they pass addresses and descriptors in memory that a filter can't read. The
//! exception is the socket to the dialer, from which descriptors may be received: the filter
//! permits its number only, and prevents that another socket gets this number.
//!
//! [`dialer`] has the filter of the dialer process.

pub(super) mod dialer;

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::GatewayNeeds;

/// System calls by number. One of a call's rules has to match; a call without rules is always
/// matched.
type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// Restricts all threads to the system calls that serving needs.
pub(super) fn restrict(needs: GatewayNeeds) -> Result<(), String> {
    apply(gateway_calls(needs))
}

fn apply(calls: Result<Calls, Error>) -> Result<(), String> {
    let [deadly, allowed] = calls.and_then(filters).map_err(|error| error.to_string())?;
    for filter in [deadly, allowed] {
        apply_filter_all_threads(&filter).map_err(reason)?;
    }
    Ok(())
}

fn reason(error: Error) -> String {
    match error {
        Error::Seccomp(error) | Error::Prctl(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// Builds the two filters: one kills, the other allows. The kernel applies the stricter result, so
/// allowing a call in one doesn't override the other.
fn filters(allowed: Calls) -> Result<[BpfProgram; 2], Error> {
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    let refusal = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let deadly: Calls = KILLING_CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let deadly =
        SeccompFilter::new(deadly, SeccompAction::Allow, SeccompAction::KillProcess, here)?;
    let allowed = SeccompFilter::new(allowed, refusal, SeccompAction::Allow, here)?;
    Ok([deadly.try_into()?, allowed.try_into()?])
}

/// Calls that kill the process. They run programs, access other processes, change identity or
/// namespaces, or change the kernel; no library makes them on its own.
const KILLING_CALLS: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
];

/// Calls of servers: existing sockets accept clients.
const SERVER_CALLS: [i64; 2] = [libc::SYS_accept, libc::SYS_accept4];

/// Calls that are allowed with any arguments.
const UNCONDITIONAL_CALLS: &[i64] = &[
    // Existing sockets receive.
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_recvfrom,
    // Files.
    libc::SYS_close,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    // Threads, and signals to this process.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Older variants of the calls above, which newer architectures don't have.
#[cfg(target_arch = "x86_64")]
const LEGACY_CALLS: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_getdents,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY_CALLS: &[i64] = &[];

// C libraries disagree about the type of these numbers.
const TCGETS: u64 = 0x5401;
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;

/// Flags for files that are appended to: write-only, at the end, never truncated; created if
/// missing; links aren't followed.
const APPEND_FLAGS: u64 = (libc::O_WRONLY
    | libc::O_APPEND
    | libc::O_CREAT
    | libc::O_CLOEXEC
    | libc::O_NOFOLLOW
    | libc::O_NONBLOCK)
    .cast_unsigned() as u64;
/// Mode of files created that way.
const APPEND_MODE: u64 = 0o640;
/// Flag that C libraries may or may not add.
const LARGE_FILE_FLAG: u64 = rustix::fs::OFlags::LARGEFILE.bits() as u64;
const LOWER: u64 = 0xffff_ffff;

/// Socket options set after the sandbox is entered, each with its level.
const SOCKET_OPTIONS: [[libc::c_int; 2]; 5] = [
    [libc::SOL_SOCKET, libc::SO_KEEPALIVE],
    [libc::IPPROTO_TCP, libc::TCP_NODELAY],
    [libc::IPPROTO_TCP, libc::TCP_KEEPIDLE],
    [libc::IPPROTO_TCP, libc::TCP_KEEPINTVL],
    [libc::IPPROTO_TCP, libc::TCP_KEEPCNT],
];

/// Permits opening files for reading only, even where Landlock doesn't enforce it. The flags are
/// the argument with this index.
fn to_read(flags: u8) -> Result<SeccompRule, Error> {
    clear(flags, libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC)
}

/// Adds a call that is allowed if one of `rules` matches.
fn add(calls: &mut Calls, call: i64, rules: Vec<Result<SeccompRule, Error>>) -> Result<(), Error> {
    calls.insert(call, rules.into_iter().collect::<Result<_, _>>()?);
    Ok(())
}

/// Returns the calls that every sandboxed process may make.
fn common_calls() -> Result<Calls, Error> {
    let mut calls: Calls =
        UNCONDITIONAL_CALLS.iter().chain(LEGACY_CALLS).map(|call| (*call, Vec::new())).collect();
    let process = std::process::id().into();
    let mut add = |call, rules| add(&mut calls, call, rules);

    add(libc::SYS_openat, vec![to_read(2)])?;
    #[cfg(target_arch = "x86_64")]
    add(libc::SYS_open, vec![to_read(1)])?;
    // Not F_SETFL: clearing O_APPEND would allow overwriting files that may only be appended to.
    let flags = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC];
    add(libc::SYS_fcntl, flags.map(|command| is(1, bits(command))).into())?;
    // TCGETS checks for a terminal; the standard library uses the other two.
    add(libc::SYS_ioctl, [TCGETS, FIONBIO, FIOCLEX].map(|request| is(1, request)).into())?;

    // No memory becomes executable.
    add(libc::SYS_mmap, vec![clear(2, libc::PROT_EXEC)])?;
    add(libc::SYS_mprotect, vec![clear(2, libc::PROT_EXEC)])?;

    // Threads, but no processes. A filter can't read the flags of clone3, so that call is refused,
    // and C libraries fall back to clone.
    add(libc::SYS_clone, vec![masked(0, bits(libc::CLONE_THREAD), bits(libc::CLONE_THREAD))])?;
    add(libc::SYS_prctl, vec![is(0, bits(libc::PR_SET_NAME)), is(0, bits(libc::PR_GET_NAME))])?;
    // Queries only; limits can't be changed.
    add(libc::SYS_prlimit64, vec![is_null(2)])?;
    // Used by abort().
    add(libc::SYS_tgkill, vec![is(0, process)])?;
    add(libc::SYS_getsockopt, vec![is_option([libc::SOL_SOCKET, libc::SO_ERROR])])?;
    Ok(calls)
}

fn gateway_calls(needs: GatewayNeeds) -> Result<Calls, Error> {
    let mut calls = common_calls()?;
    calls.extend(SERVER_CALLS.map(|call| (call, Vec::new())));
    let mut add = |call, rules| add(&mut calls, call, rules);

    if needs.appends {
        // Exactly these flags and this mode, so that existing contents can't be truncated.
        let flags = condition(2, SeccompCmpOp::MaskedEq(!LARGE_FILE_FLAG & LOWER), APPEND_FLAGS)?;
        add(libc::SYS_openat, vec![to_read(2), both(flags, is_so(3, APPEND_MODE)?)])?;
        add(libc::SYS_fdatasync, vec![])?;
    }
    if needs.writes_open_files {
        add(libc::SYS_pwrite64, vec![])?;
        add(libc::SYS_fdatasync, vec![])?;
    }
    if needs.removes_sockets {
        add(libc::SYS_unlinkat, vec![is(2, 0)])?;
        #[cfg(target_arch = "x86_64")]
        add(libc::SYS_unlink, vec![])?;
    }
    if let Some(socket) = needs.receives_descriptors_on {
        add(libc::SYS_recvmsg, vec![is(0, bits(socket))])?;
        // The number stays that of this socket: it is never closed, and dup2 isn't listed.
        let other = condition(0, SeccompCmpOp::Ne, bits(socket))?;
        add(libc::SYS_close, vec![Ok(SeccompRule::new(vec![other])?)])?;
    }
    // For the calling thread only: decoder threads set their niceness.
    add(libc::SYS_getpriority, vec![is(1, 0)])?;
    add(libc::SYS_setpriority, vec![both(is_so(0, 0)?, is_so(1, 0)?)])?;

    // Neither an address nor MSG_FASTOPEN, either of which would select the receiver.
    let flags = only(3, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT, 0)?;
    add(libc::SYS_sendto, vec![both(flags, null(4)?)])?;
    // A listener that is shut down for reading turns into a socket that can be connected.
    add(libc::SYS_shutdown, vec![is(1, bits(libc::SHUT_WR))])?;
    add(libc::SYS_setsockopt, SOCKET_OPTIONS.map(is_option).into())?;
    // Signal delivery uses such a pair. Datagram sockets are refused: they could send to any
    // address.
    let stream = only(1, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, bits(libc::SOCK_STREAM))?;
    add(libc::SYS_socketpair, vec![both(is_so(0, bits(libc::AF_UNIX))?, stream)])?;
    Ok(calls)
}

/// Matches a socket option and its level, the arguments of `setsockopt`.
fn is_option([level, option]: [libc::c_int; 2]) -> Result<SeccompRule, Error> {
    both(is_so(1, bits(level))?, is_so(2, bits(option))?)
}

/// Converts a C value to the lower half of an argument, whatever its sign.
fn bits(value: libc::c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

fn is(argument: u8, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![is_so(argument, value)?])?)
}

fn clear(argument: u8, mask: libc::c_int) -> Result<SeccompRule, Error> {
    masked(argument, bits(mask), 0)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![condition(argument, SeccompCmpOp::MaskedEq(mask), value)?])?)
}

fn both(one: SeccompCondition, other: SeccompCondition) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![one, other])?)
}

fn is_so(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::Eq, value)
}

/// The kernel uses only the lower half of arguments that aren't addresses.
fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

/// Matches arguments in which the bits of `mask` are clear.
fn is_clear(argument: u8, mask: libc::c_int) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::MaskedEq(bits(mask)), 0)
}

/// Matches arguments equal to `value`, ignoring the bits of `optional`.
fn only(argument: u8, optional: libc::c_int, value: u64) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::MaskedEq(!bits(optional) & LOWER), value)
}

fn is_null(argument: u8) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![null(argument)?])?)
}

/// Matches a null address, compared in full.
fn null(argument: u8) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?)
}

/// Applies the strictest filters to the calling thread only, for example to test what works under
/// them.
///
/// # Errors
/// The kernel rejects a filter.
pub fn restrict_this_thread() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    for filter in filters(gateway_calls(GatewayNeeds::default())?)? {
        seccompiler::apply_filter(&filter)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: GatewayNeeds = GatewayNeeds {
        removes_sockets: true,
        appends: true,
        writes_open_files: true,
        receives_descriptors_on: Some(3),
    };

    #[test]
    fn filters_fit_the_kernel_limit() {
        for calls in [gateway_calls(GatewayNeeds::default()), gateway_calls(ALL), dialer::calls(0)]
        {
            for filter in filters(calls.unwrap()).unwrap() {
                assert!((10..4096).contains(&filter.len()), "{}", filter.len());
            }
        }
    }

    #[test]
    fn no_call_is_both_allowed_and_killing() {
        let [less, more] =
            [GatewayNeeds::default(), ALL].map(|needs| gateway_calls(needs).unwrap());
        let dialer = dialer::calls(0).unwrap();
        assert!(
            KILLING_CALLS.iter().all(|call| !more.contains_key(call) && !dialer.contains_key(call))
        );
        for call in [libc::SYS_unlinkat, libc::SYS_fdatasync, libc::SYS_pwrite64, libc::SYS_recvmsg]
        {
            assert!(more.contains_key(&call) && !less.contains_key(&call));
        }
        for call in [
            libc::SYS_clone3,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_sendmsg,
            libc::SYS_sendmmsg,
            libc::SYS_recvmmsg,
            libc::SYS_splice,
            libc::SYS_sendfile,
            libc::SYS_memfd_create,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
        ] {
            assert!(!more.contains_key(&call));
        }
        for call in [
            libc::SYS_clone3,
            libc::SYS_accept4,
            libc::SYS_listen,
            libc::SYS_socketpair,
            libc::SYS_dup3,
            libc::SYS_memfd_create,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
        ] {
            assert!(!dialer.contains_key(&call));
        }
    }
}
