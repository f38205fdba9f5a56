/* The kernel half of the uprobe capture: copies TLS plaintext of provider connections in scope.
 *
 * Deny by default. A connection is admitted when its host name is in `hosts` and its process is in
 * scope (`in_scope`); nothing of any other connection reaches user space:
 *  - the name is the SNI, given to SSL_set_tlsext_host_name or SSL_ctrl(55) before the handshake;
 *  - without one (the connection is older than the probes) it is the library's own copy of it, once
 *    we know where this library keeps that ("where the library keeps the name", below);
 *  - until then it is the Host of the next HTTP/1 request head. That head, at most HEAD_BYTES_MAX of
 *    it, is read into scratch memory, judged there, and discarded: it is not shown to user space
 *    unless admitted. HTTP/2 stays unknown, hence uncopied: its names are compressed, after the first
 *    request to a number that only its two ends can read. It is counted, user space learns its process,
 *    and it is judged again once the location of its name is known.
 *
 * Loss is exact: each direction of a connection has an offset that moves on even when the ring is
 * full or the copy fails; every record carries its offset, its true length and the part captured.
 *
 * Compiles in two ways from this one text, without kernel or libbpf headers in the second:
 *   bcc (HALTON_BCC defined), or  clang -O2 -g -target bpf -D__TARGET_ARCH_x86 -c probe.bpf.c
 * No kprobes, no CO-RE. Needs Linux 5.15 (cookies of probes, ring buffer, bounded loops, variable stack offsets).
 * User space's view of the records is in protocol.py; its names of programs and maps are in loader.py.
 */

#ifndef RING_BYTES
#define RING_BYTES (8 * 1024 * 1024)
#endif
#define PROCESS_RING_BYTES (1024 * 1024) /* 230 execs with the longest arguments, 1,500 usual ones */

#define HOST_BYTES_MAX 128 /* longer names are nobody's we meter: denied */
#define HEAD_BLOCK_BYTES 125 /* of it are searched by one call: 17 of them, that overlap, are 2,045 */
#define HEAD_BYTES_MAX 2048 /* how far into a request head we look for Host */
#define PIECE_BYTES_MAX 16384 /* one TLS record; one ring record */
#define PIECES_MAX 64 /* ring records a call: 1 MiB; the rest of a larger write is a hole */
#define FRAMES_MAX 3 /* calls in progress on one thread: TLS in TLS, _ex within _ex2 */
#define NESTED_STACK_BYTES 2048 /* an inner call's frame lies at most this far below its caller's */
#define HTTP2_FRAMES_MAX 6 /* of one write, looked at for the one that begins a request */
#define HTTP2_PREFACE 0x5448202a20495250ULL /* "PRI * HT" */
#define HTTP2_PREFACE_BYTES 24
#define CONNECTIONS_MAX 16384
#define DENIED_MAX 32768
#define THREADS_MAX 32768
#define TREE_MAX 65536
#define HOSTS_MAX 4096
#define UIDS_MAX 1024
#define FILE_PROGRAMS_MAX 256 /* as many as the cookie has numbers for */
#define FILES_MAX 4096 /* files with a number of their own */
#define NAME_BLOCK_BYTES 256 /* searched by one call */
#define NAME_SCAN_BYTES 4096 /* of an SSL object: OpenSSL 1.1.1 has it at 1600, 3.0 at 2648, 3.5 at 2592 */
#define NAME_VOTES_MIN 2 /* connections: one might be chance, memory that another use has left */
#define NAME_SCANS_MAX 16 /* of one file, without enough votes */
#define PATH_BYTES_MAX 256
#define ARGUMENT_BYTES_MAX 4096 /* of all arguments of an exec; what is longer is cut */
#define LAST_ARGUMENT_BYTES_MAX 256 /* of the last one, where there is no environment behind it */
#define VARIABLES_MAX 256 /* of an environment, in which HALTON_PROJECT is looked for */
#define PROJECT_BYTES_MAX 208
#define SOCKETS_MAX 16384 /* TCP connections of processes in scope that may lead to a provider */
#define ADDRESSES_MAX 4096 /* of provider hosts */
#define HELLO_WRITES_MAX 12 /* of a connection, in which its ClientHello is looked for: behind a proxy's greeting */
#define HELLO_BYTES_MAX 4096 /* of a ClientHello: with keys that outlive quantum computers some 1,800 */
#define HELLO_PIECES_MAX 8 /* of one write that holds a ClientHello, or its beginning */
#define HELLO_RANDOM_AT 11 /* behind the heads of record and handshake, and the version */
#define EXTENSIONS_MAX 48 /* of a ClientHello; browsers send some 20 */
#define RECORDS_MAX 12 /* TLS records of one write, looked at until the first that holds a request */
#define ALERT_BYTES_MAX 24 /* of a TLS record: alerts and key updates are no request */
#define LATE_NS 20000000 /* a connection first seen this long after its first request was probed late */
#define QUIC_BYTES_MIN 1200 /* of a datagram that opens a QUIC connection (RFC 9000, 14.1) */
#define ADDRESSES_A_LOOKUP_MAX 8
#define RUSTLS_PIECES_MAX 64 /* of one record that is sent: hyper hands over so many at once */
#define RUSTLS_BLOCK_BYTES 256 /* searched by one call */
#define RUSTLS_SCAN_BYTES 2048 /* of a connection: 0.23 has its state at 904 */
#define RUSTLS_STATES_MAX 8 /* places in a connection where its state may be */
#define RUSTLS_STATE_BYTES 512 /* of a state, in which the name is looked for: 0.23 has it at 16 */
#define RUSTLS_SCANS_MAX 32 /* in a row that found no name: a thread's next write may be another connection's */
#define RUSTLS_MISSES_MAX 3 /* connections of one file of which a record passed no probe */
#define RUSTLS_NAME_BYTES_MIN 4 /* "a.io" */
#define PAUSING_MAX 256 /* processes that are paused before each request */
#define STOP_SIGNAL 19 /* SIGSTOP */

#ifdef HALTON_BCC
#include <uapi/linux/bpf.h>
#include <uapi/linux/ptrace.h>
#include <uapi/asm-generic/errno-base.h>
#define SECTION(name)
#else
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;
#define SECTION(name) __attribute__((section(name), used))
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define EEXIST 17
#endif

/* Of linux/socket.h, in.h and net/tcp_states.h. */
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262
#define MSG_PEEK 2
#define MSG_ERRQUEUE 0x2000
#define TCP_SYN_SENT 2
#define TCP_CLOSE 7

#define INLINE static inline __attribute__((always_inline, unused))
/* A function that the verifier goes through once, not again for each state in which it is called. It
 * may be given no pointer at all, and looks. */
#ifdef HALTON_BCC
#define APART INLINE
#define IS_BCC 1
#else
#define APART __attribute__((noinline))
#define IS_BCC 0
#endif

/* By number: bcc's headers may be older than they are. */
static void *(*current_task)(void) = (void *)158; /* bpf_get_current_task_btf */
static void *(*task_registers)(void *) = (void *)175; /* bpf_task_pt_regs */
static long (*send_signal)(u32) = (void *)109; /* bpf_send_signal */

#ifndef HALTON_BCC
/* What we read of the kernel's own, wherever it has that: libbpf looks it up in the kernel's types. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
typedef struct {
	int counter;
} atomic_t;
struct signal_struct {
	atomic_t live; /* threads that have not begun to end */
};
struct task_struct {
	struct signal_struct *signal;
};
#pragma clang attribute pop
#endif

/* ---- registers -------------------------------------------------------------------------- */

#if defined(__TARGET_ARCH_arm64) || defined(__aarch64__)
struct registers {
	u64 x[31];
	u64 sp;
	u64 pc;
};
#define ARG1(r) ((r)->x[0])
#define ARG2(r) ((r)->x[1])
#define ARG3(r) ((r)->x[2])
#define ARG4(r) ((r)->x[3])
#define ARG5(r) ((r)->x[4])
#define RESULT(r) ((r)->x[0])
#define SYSCALL(r) (&(r)->x[8])
#define CALL_ARG2(r) (&(r)->x[1])
#define CALL_ARG3(r) (&(r)->x[2])
#define CALL_ARG5(r) (&(r)->x[4])
enum system_call { CALL_WRITE = 64, CALL_WRITEV = 66, CALL_SENDTO = 206, CALL_SENDMSG = 211, CALL_SENDMMSG = 269 };
#define GO_CONNECTION(r) ((r)->x[0])
#define GO_BUFFER(r) ((r)->x[1])
#define GO_LENGTH(r) ((r)->x[2])
#define GO_GOROUTINE(r) ((r)->x[28])
#define ENTRY_SP_AT_ENTRY(r) ((r)->sp)
#define ENTRY_SP_AT_RETURN(r) ((r)->sp)
#else
struct registers {
	u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs,
		flags, sp, ss;
};
#define ARG1(r) ((r)->di)
#define ARG2(r) ((r)->si)
#define ARG3(r) ((r)->dx)
#define ARG4(r) ((r)->cx)
#define ARG5(r) ((r)->r8)
#define RESULT(r) ((r)->ax)
#define SYSCALL(r) (&(r)->orig_ax)
#define CALL_ARG2(r) (&(r)->si)
#define CALL_ARG3(r) (&(r)->dx)
#define CALL_ARG5(r) (&(r)->r8)
enum system_call { CALL_WRITE = 1, CALL_WRITEV = 20, CALL_SENDTO = 44, CALL_SENDMSG = 46, CALL_SENDMMSG = 307 };
#define GO_CONNECTION(r) ((r)->ax)
#define GO_BUFFER(r) ((r)->bx)
#define GO_LENGTH(r) ((r)->cx)
#define GO_GOROUTINE(r) ((r)->r14)
#define ENTRY_SP_AT_ENTRY(r) ((r)->sp)
#define ENTRY_SP_AT_RETURN(r) ((r)->sp - 8) /* `ret` has popped the return address */
#endif

/* ---- what user space reads (protocol.py) --------------------------------------------------- */

enum kind { KIND_OPEN = 1, KIND_CHUNK = 2, KIND_CLOSE = 3, KIND_EXIT = 4, KIND_EXEC = 5, KIND_SHUTDOWN = 6, KIND_MAPPED = 7, KIND_NOT_HTTP = 8, KIND_LOOKUP = 9, KIND_UNNAMED = 10, KIND_LEARNED = 11, KIND_SOCKET_SEEN = 12, KIND_SOCKET_ENDED = 13, KIND_USED = 14, KIND_QUIC = 15, KIND_RECORDS_MISSED = 22, KIND_PAUSED = 23 };
enum direction { SENT = 0, RECEIVED = 1 };
enum record_flag { FLAG_JOINED = 1 };

struct record {
	u32 size; /* this header and the bytes that follow it: a frame, as it goes over the socket */
	u16 kind;
	u8 direction;
	u8 flags;
	u32 tgid;
	u32 uid;
	u64 ssl;
	u64 opened_ns; /* with tgid and ssl, the connection's identity */
	u64 at_ns; /* CLOCK_MONOTONIC */
	u64 offset; /* of this chunk; of a CLOSE, the bytes sent in all; of an OPEN, when its process was
		     * forked, which no later process of that number shares (0: not known) */
	u32 length; /* of an OPEN, the run that the process belongs to */
	u32 captured;
};

enum statistic {
	STAT_CHUNKS, /* chunk records handed over */
	STAT_RING_FULL_RECORDS,
	STAT_RING_FULL_BYTES,
	STAT_COPY_FAILED_BYTES,
	STAT_CALL_TOO_LONG_BYTES,
	STAT_REQUEST_CUT_BYTES,
	STAT_CONNECTION_TABLE_FULL,
	STAT_THREAD_TABLE_FULL,
	STAT_NOTICES_LOST, /* OPEN, CLOSE or EXIT records that found the ring full */
	STAT_PROCESS_RING_FULL,
	STAT_HEADS_JUDGED,
	STAT_HEADS_WITHOUT_HOST,
	STAT_HTTP2_WITHOUT_NAME,
	STAT_ADMITTED,
	STAT_DENIED,
	STAT_NOT_HTTP, /* connections of functions found by structure whose bytes are not HTTP */
	STAT_SOCKET_TABLE_FULL, /* TCP connections that are not followed, so not counted either */
	STAT_RAN_AS_ANOTHER_USER, /* programs that a run's processes became as another user */
	STAT_RECORDS_MISSED, /* rustls connections whose records did not follow on each other */
	STATS,
};

/* ---- maps ---------------------------------------------------------------------------------- */

enum tree_flag { TREE_IN_SCOPE = 1, TREE_EXCLUDED = 2 };
#define TREE_FLAG_BITS 2 /* above them: the number of a run */
#define TREE_FORKED 0x80000000u /* in a key */
enum scope_flag { SCOPE_EVERYONE = 1, SCOPE_UIDS = 2, SCOPE_TREES = 4, SCOPE_CGROUP = 8, SCOPE_OWNER = 16 };

/* The cookie of a file's probes (attachments.py); Go's are other programs, with cookies of their own.
 * Where all probes of a file are attached at once, the uppermost byte is the number of the program that
 * belongs there (attaching.py), and is nobody else's business. */
enum cookie_part { COOKIE_FILE = 0xffff, COOKIE_UNPROVED = 0x10000, COOKIE_PROGRAM_BITS = 8 };
#define OWN_PART(cookie) ((cookie) << COOKIE_PROGRAM_BITS >> COOKIE_PROGRAM_BITS)

/* The same of rustls' probes (rustls_layer.py). Registers are numbered as the words of `struct
 * registers`; `REST` is the Ok tag of a result, or where the layer is from its register on, in words. */
enum rustls_cookie_shift { RUSTLS_LAYER = 17, RUSTLS_OBJECT = 22, RUSTLS_OFFSET = 27, RUSTLS_COUNTED = 43, RUSTLS_REST = 44 };

/* Values of `denied`, other than Go's origin. */
enum denied_as { DENIED = 0, UNNAMED_SO_FAR = 1 };

/* Of a process, by its fork. It may have ended before it is looked at, and so may those that forked it:
 * `program` is the process above it that ran the program which it has. */
struct birth {
	u32 parent;
	u32 program; /* 0: it has begun one itself */
	u64 at_ns;
	u64 left_ns; /* when it, or the one above it, was forked from that */
	u64 parent_ns; /* when its parent was forked (0: not known) */
};

struct settings {
	u32 scope;
	u32 request_bytes_max; /* sent without anything received in between; more is cut */
	u64 cgroup;
	u32 cgroup_level;
	u32 pid_namespace; /* 1: pids are those of the namespace below */
	u64 namespace_device;
	u64 namespace_inode;
	u32 owner; /* with SCOPE_OWNER: of a tree, only processes of this user are in scope */
	u32 unused;
};

struct pausing {
	u64 until_ns; /* user space renews it as long as it is there to let the process go on */
	u32 uid; /* of whoever may stop it anyway */
	u32 unused;
};

struct key {
	u64 ssl;
	u32 tgid;
	u32 zero;
};

struct connection {
	u64 opened_ns;
	u64 sent; /* offsets: plaintext bytes so far, captured or not */
	u64 received;
	u64 burst; /* sent since something was last received */
	u64 lost_bytes;
	u64 origin; /* Go: the address of the host's name, to tell when a *Conn is used again */
	u32 uid;
	u8 announced;
	u8 joined;
	u8 closed; /* its CLOSE found the ring full: user space sweeps it up */
	u8 linked; /* the socket that carries it is known */
	char comm[16];
	char host[HOST_BYTES_MAX];
};

struct frame {
	u64 sp; /* 0: free */
	u64 ssl;
	u64 buffer;
	u64 length_pointer;
	u64 direction;
};

struct thread {
	struct frame frame[FRAMES_MAX];
};

struct go_key {
	u64 goroutine; /* a call may return on another thread, never in another goroutine */
	u32 tgid;
	u32 direction;
};

struct go_call {
	u64 connection;
	u64 buffer;
};

/* What is known of a rustls connection: what its next record must be to be its next. */
enum rustls_state {
	RUSTLS_NEW = 0, /* seen from its first record on, not judged yet */
	RUSTLS_JOINED = 1, /* the same, but its first records were missed */
	RUSTLS_ADMITTED = 2,
	RUSTLS_UNNAMED = 3, /* HTTP/2; judged again once the location of its name is known */
	RUSTLS_DENIED = 4,
};
#define RUSTLS_MISSED_BEGINNING 1 /* of the states before a connection is judged */

struct rustls {
	u64 id; /* its key in `connections`: no address, and given once */
	u64 decrypter;
	u64 next_sent; /* numbers of records */
	u64 next_received;
	u8 state;
	u8 sent_update; /* the last record was a KeyUpdate: another encrypter may follow */
	u8 received_update;
	u8 tls12; /* the handshake's last record had the key of what follows: no name is kept */
	u32 early; /* data bytes received before any was sent */
	u8 by_request; /* its host was told by a request: it may show where rustls keeps it */
	u8 unused[7];
};

/* A part of rustls' RecordLayer, from its encrypter on. */
struct rustls_layer {
	u64 encrypter;
	u64 encrypter_table;
	u64 decrypter;
	u64 decrypter_table;
	u64 sent_max;
	u64 sent; /* records with this key */
	u64 received;
};

struct rustls_call { /* a record that a thread decrypts */
	u64 encrypter; /* 0: none that is wanted */
	u64 id;
};

struct rustls_sender { /* what a thread has encrypted last */
	u64 base;
	u64 cookie;
	u64 unnamed; /* HTTP/2 of a name that is not known: its id */
};

enum socket_state { SOCKET_NEW = 0, SOCKET_SEEN = 1 };
enum socket_flag {
	SOCKET_NO_NAME = 1, /* its ClientHello has no server name */
	SOCKET_ECH = 2, /* its ClientHello names another host, and has a part that is encrypted */
	SOCKET_ASKED_PROXY = 4, /* it began with an HTTP CONNECT */
	SOCKET_BY_ADDRESS = 8, /* its host is known by the address alone */
	SOCKET_UNREAD = 16, /* what was written could not be read (io_uring, sendfile, splice, sendmmsg) */
	SOCKET_TLS12 = 32,
	SOCKET_FINISHED = 64, /* the client's part of the handshake is over */
	SOCKET_LATE = 128, /* the probes saw its TLS connection only after its first request */
	SOCKET_FOLLOWED = 256, /* its records are known, from the ClientHello on */
	SOCKET_UNNAMED = 512, /* its TLS connection passes the probes, which find no name of its host */
};

/* A TCP connection that a process in scope has opened, by what passes its socket. */
struct tcp_socket {
	u64 opened_ns;
	u64 born_ns; /* of its process */
	u64 sent;
	u64 received;
	u64 hello_sent; /* of `sent`, up to the ClientHello's end */
	u64 used_ns; /* when the first bytes of an application were sent; 0: none were */
	u64 linked; /* the SSL object (Go: *Conn) that the probes saw write on it; 0: none */
	u64 skip; /* bytes up to the next TLS record that the client sends */
	u64 left_ns; /* of its process's birth, as `program` is */
	u64 parent_ns;
	u32 tgid;
	u32 uid;
	u32 run;
	u16 port;
	u16 family;
	u8 address[16]; /* IPv4: the first four */
	u8 state;
	u8 writes;
	u16 flags;
	u32 hello; /* of its ClientHello's random bytes the first four: who passes it on has the same */
	u32 parent; /* of its process, at its fork; 0: not known */
	u32 program;
	char comm[16];
	char host[HOST_BYTES_MAX];
};

/* What a connection has sent of its ClientHello. */
struct hello_bytes {
	u32 length;
	u8 bytes[HELLO_BYTES_MAX];
};

/* The same while it is put together: the verifier wants room for a whole piece behind the last one. */
struct hello_room {
	struct hello_bytes hello;
	u8 beyond[HELLO_BYTES_MAX];
};

struct address {
	u8 bytes[16];
} __attribute__((aligned(8)));

struct host_name {
	char text[HOST_BYTES_MAX];
};

/* What a UDP socket has opened: one may lead to several hosts, and its memory becomes another's. */
struct quic_key {
	u64 sk;
	u32 tgid;
	u16 own_port;
	u16 zero;
	struct address to;
};

struct lookup_call {
	u64 result; /* where getaddrinfo puts its list */
	char host[HOST_BYTES_MAX];
};

enum name_state {
	NAME_SOUGHT = 0,
	NAME_KNOWN = 1,
	NAME_GIVEN_UP = 2,
	NAME_ASSUMED = 3, /* of this version of rustls: one connection has to show that it is true */
};

struct name_location {
	u32 offset; /* within an SSL object, of the pointer to the library's copy of the name; of rustls,
		     * within a connection, of the pointer to its state << 16 | within that, of the name */
	u8 state;
	u8 votes;
	u8 scans;
	u8 unused;
	u64 voter; /* when the connection was opened that was looked at last */
};

/* An exec, in head.offset the parent at birth (0: not known), in head.length the bytes of the
 * arguments, of which head.captured are here. A process may be gone before it is looked at. */
struct exec_record {
	struct record head;
	char comm[16];
	char path[PATH_BYTES_MAX]; /* as given to execve */
	char project[PROJECT_BYTES_MAX]; /* HALTON_PROJECT=…, or nothing */
	char arguments[ARGUMENT_BYTES_MAX + LAST_ARGUMENT_BYTES_MAX];
};
#define EXEC_BYTES_MIN (sizeof(struct exec_record) - ARGUMENT_BYTES_MAX - LAST_ARGUMENT_BYTES_MAX)

struct host_key {
	u32 bits;
	char reversed[HOST_BYTES_MAX]; /* a whole name ends in NUL, a suffix in '.' */
};

/* How a map is declared, once for both compilers. Each has accessors NAME_get, _set, _add (not if it
 * is there) and _drop: for bcc they are written out below, as it rewrites method calls only where it
 * finds them in the text. */
#ifdef HALTON_BCC
#define ARRAY(name, value_type, size) BPF_ARRAY(name, value_type, size)
#define PERCPU_ARRAY(name, value_type, size) BPF_PERCPU_ARRAY(name, value_type, size)
#define HASH(name, key_type, value_type, size) \
	BPF_F_TABLE("hash", key_type, value_type, name, size, BPF_F_NO_PREALLOC)
#define LRU_HASH(name, key_type, value_type, size) BPF_TABLE("lru_hash", key_type, value_type, name, size)
#define TRIE(name, key_type, value_type, size) \
	BPF_F_TABLE("lpm_trie", key_type, value_type, name, size, BPF_F_NO_PREALLOC)
#define RING(name, bytes) BPF_RINGBUF_OUTPUT(name, (bytes) / 4096)
#else
struct bpf_pidns_info {
	u32 pid;
	u32 tgid;
};
static void *(*bpf_map_lookup_elem)(void *, const void *) = (void *)1;
static long (*bpf_map_update_elem)(void *, const void *, const void *, u64) = (void *)2;
static long (*bpf_map_delete_elem)(void *, const void *) = (void *)3;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_tail_call)(void *, void *, u32) = (void *)12;
static u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static u64 (*bpf_get_current_uid_gid)(void) = (void *)15;
static long (*bpf_get_current_comm)(void *, u32) = (void *)16;
static long (*bpf_probe_read_user)(void *, u32, const void *) = (void *)112;
static long (*bpf_probe_read_kernel)(void *, u32, const void *) = (void *)113;
static long (*bpf_probe_read_user_str)(void *, u32, const void *) = (void *)114;
static long (*bpf_probe_read_kernel_str)(void *, u32, const void *) = (void *)115;
static long (*bpf_get_ns_current_pid_tgid)(u64, u64, void *, u32) = (void *)120;
static u64 (*bpf_get_current_ancestor_cgroup_id)(int) = (void *)123;
static long (*bpf_ringbuf_output)(void *, void *, u64, u64) = (void *)130;
static void *(*bpf_ringbuf_reserve)(void *, u64, u64) = (void *)131;
static void (*bpf_ringbuf_submit)(void *, u64) = (void *)132;
static void (*bpf_ringbuf_discard)(void *, u64) = (void *)133;
static u64 (*bpf_ringbuf_query)(void *, u64) = (void *)134;
static u64 (*bpf_get_attach_cookie)(void *) = (void *)174;

#define MAP(name, map_type, key_type, value_type, size, flags) \
	struct { \
		int (*type)[map_type]; \
		key_type *key; \
		value_type *value; \
		int (*max_entries)[size]; \
		int (*map_flags)[flags]; \
	} name SECTION(".maps"); \
	INLINE value_type *name##_get(key_type *k) { return bpf_map_lookup_elem(&name, k); } \
	INLINE long name##_set(key_type *k, value_type *v) { return bpf_map_update_elem(&name, k, v, BPF_ANY); } \
	INLINE long name##_add(key_type *k, value_type *v) { return bpf_map_update_elem(&name, k, v, BPF_NOEXIST); } \
	INLINE long name##_drop(key_type *k) { return bpf_map_delete_elem(&name, k); } \
	struct name##_needs_a_semicolon
#define NO_PREALLOC 1
#define HASH(name, key_type, value_type, size) MAP(name, 1, key_type, value_type, size, NO_PREALLOC)
#define ARRAY(name, value_type, size) MAP(name, 2, u32, value_type, size, 0)
#define PERCPU_ARRAY(name, value_type, size) MAP(name, 6, u32, value_type, size, 0)
#define LRU_HASH(name, key_type, value_type, size) MAP(name, 9, key_type, value_type, size, 0)
#define TRIE(name, key_type, value_type, size) MAP(name, 11, key_type, value_type, size, NO_PREALLOC)
#define PROGRAM_ARRAY(name, size) \
	struct { \
		int (*type)[3]; \
		int (*key_size)[4]; \
		int (*value_size)[4]; \
		int (*max_entries)[size]; \
	} name SECTION(".maps")
#define RING(name, bytes) \
	struct { \
		int (*type)[27]; \
		int (*max_entries)[bytes]; \
	} name SECTION(".maps"); \
	INLINE void *name##_reserve(u64 size) { return bpf_ringbuf_reserve(&name, size, 0); } \
	INLINE void name##_submit(void *p) { bpf_ringbuf_submit(p, 0); } \
	INLINE void name##_discard(void *p) { bpf_ringbuf_discard(p, 0); } \
	INLINE long name##_output(void *p, u64 size) { return bpf_ringbuf_output(&name, p, size, 0); } \
	INLINE u64 name##_query(u64 what) { return bpf_ringbuf_query(&name, what); } \
	struct name##_needs_a_semicolon
#endif

/* --- what to copy --- */

/* Key: 0. Value: the scope and the limits. User space writes it once, at the start (scope.py); every
 * program reads it, and does nothing while it is missing. */
ARRAY(settings, struct settings, 1);

/* Key: a user id in scope. Value: 1. User space writes it at the start (scope.py); `in_scope` reads. */
HASH(uids, u32, u8, UIDS_MAX);

/* Key: a host name or a suffix, reversed, with its length in bits: the longest prefix matches. Value:
 * 1. User space writes it (scope.py); `wanted_host` reads. */
TRIE(hosts, struct host_key, u8, HOSTS_MAX);

/* Which processes descend from whom. Key: a pid of the helper's namespace, or, with TREE_FORKED, of the
 * first one. Value: tree_flag bits, and above them the number of a run. User space writes those that it
 * is told of (process_tree.py); `forked` copies the parent's to the child, `executed` moves an entry to
 * the other key, `exited` drops it; `membership` reads. */
HASH(tree, u32, u32, TREE_MAX);

/* Key: a pid of the first namespace. Value: its parent, and when it was forked. `forked` writes,
 * `exited` drops; `born_ns` and `executed` read. */
LRU_HASH(births, u32, struct birth, THREADS_MAX);

/* --- who is paused before a request (pausing.py) --- */

/* Processes near a limit. Key: a process. Value: until when, and whose it must be. User space writes and
 * drops; `pause_before_request` reads, `exited` drops. */
HASH(pausing, u32, struct pausing, PAUSING_MAX);

/* Those that were stopped so, and nobody has let go on yet. Key: a process. Value: when.
 * `pause_before_request` writes; user space reads and drops, also of a helper that died; `exited` drops. */
HASH(paused, u32, u64, PAUSING_MAX);

/* --- connections --- */

/* Connections that are metered. Key: SSL object (Go: *Conn) and process. Value: host, offsets, flags.
 * `admit` adds, entry and return programs move the offsets on, `close_connection` drops. User space
 * reads it for connections that it has to end or announce, and drops those of processes that have
 * exited (helper/connections.py). */
HASH(connections, struct key, struct connection, CONNECTIONS_MAX);

/* Connections that are not, so that each is judged once. Key: as above. Value: a `denied_as`, or Go's
 * origin (the address of the name that was judged). `deny` and `unnamed_http2` write, `admit` and
 * `forget` drop; entry programs read. User space does not look at it. */
LRU_HASH(denied, struct key, u64, DENIED_MAX);

/* Key: a process that has, or had, metered connections. Value: 1. `admit` writes; whoever ends it
 * (`executed`, `exited`) reads, sends an EXIT, and drops it. */
HASH(owners, u32, u8, CONNECTIONS_MAX);

/* --- calls in progress --- */

/* Key: thread and process id. Value: the calls that the thread is in. `enter` writes, `leave` reads and
 * frees a frame, `exited` drops. */
HASH(threads, u64, struct thread, THREADS_MAX);

/* Key: goroutine, process and direction. Value: connection and buffer of a call. `enter_go` writes,
 * `link_socket` reads, `leave_go` reads and drops. */
HASH(go_calls, struct go_key, struct go_call, THREADS_MAX);

/* --- rustls --- */

/* Its connections of processes in scope. Key: the encrypter and the process. Value: what the next record
 * must be. `enter_rustls_send` adds, it and the programs at a receive move it on. */
LRU_HASH(rustls_connections, struct key, struct rustls, DENIED_MAX);

/* Connections that get another encrypter after a KeyUpdate. Key: the decrypter, and once more the address
 * of the layer, and the process. Value: the encrypter before. `rustls_await_update` writes; `rustls_updated` reads
 * and drops. */
LRU_HASH(rustls_updates, struct key, u64, 1024);

/* Key: thread and process id. Value: the record that it decrypts. `enter_rustls_receive` writes,
 * `leave_rustls_receive` reads, `exited` drops. */
HASH(rustls_calls, u64, struct rustls_call, THREADS_MAX);

/* Key: thread and process id. Value: the connection that it has encrypted for, until it writes to a socket.
 * `enter_rustls_send` writes where the socket's name is of use, `learn_by_socket` reads and drops. */
LRU_HASH(rustls_senders, u64, struct rustls_sender, 1024);

/* --- sockets --- */

/* TCP connections that processes in scope have opened, and that may lead to a provider. Key: the
 * kernel's socket. Value: whose, where to, how much. `on_socket_state` adds, `on_socket_destroyed`
 * drops, the programs at sends and receives count. User space reads those that are open (sockets.py). */
HASH(sockets, u64, struct tcp_socket, SOCKETS_MAX);

/* QUIC connections to providers that were told of. Key: the kernel's socket, its process, its port and
 * the far address. Value: 1. `quic_opened` reads and writes. */
LRU_HASH(quic_sockets, struct quic_key, u8, 1024);

/* The SSL object that a thread writes on, until its socket is known. Key: thread and process id.
 * `enter` and `enter_rustls_send` write, `link_socket` reads, `exited` drops. Of Go `go_calls` tells. */
LRU_HASH(writing, u64, u64, 4096);

/* Addresses of provider hosts. Key: an address. Value: the name it was last looked up or connected to
 * under. `on_looked_up` and `judge_hello` write; `host_by_address` reads. */
LRU_HASH(addresses, struct address, struct host_name, ADDRESSES_MAX);

/* ClientHellos that came in several writes, up to the last. Key: the kernel's socket. `judge_socket`
 * writes, reads and drops. */
LRU_HASH(hellos, u64, struct hello_bytes, 64);

/* Calls of getaddrinfo for provider hosts. Key: thread and process id. `on_lookup` writes,
 * `on_looked_up` reads and drops. */
LRU_HASH(lookups, u64, struct lookup_call, 1024);

/* --- files (by the number that user space gave, name_locations.py) --- */

/* Functions found by structure must have passed HTTP. Key: a file's number. Value: bit 1 << direction
 * once that was so. User space clears it when it gives the number; `proved` reads and writes. */
ARRAY(proofs, u64, FILES_MAX);

/* Where a library keeps a connection's name. Key: a file's number. Value: the offset, how sure it is.
 * User space writes what it remembers when it gives the number; `learn_name_location` writes what it
 * learns; `own_name` and `may_be_named` read. */
ARRAY(name_locations, struct name_location, FILES_MAX);

#ifndef HALTON_BCC
/* Key: the number of a program that belongs at places of files (stacks.PROGRAMS). Value: the program. User
 * space writes it once, at the start (loader.py); `carry_on` reads. */
PROGRAM_ARRAY(file_programs, FILE_PROGRAMS_MAX);
#endif

/* --- scratch --- */

/* Key: 0. Value: zeros, never written: what new entries of `connections`, `threads` and so on are copied
 * from, as they are too large for the stack. */
ARRAY(blank_connection, struct connection, 1);
ARRAY(blank_thread, struct thread, 1);
ARRAY(blank_socket, struct tcp_socket, 1);
ARRAY(blank_rustls, struct rustls, 1);

/* Key: 0. Value: the record that `executed` builds and sends, on this CPU. Nobody else reads it. */
PERCPU_ARRAY(exec_scratch, struct exec_record, 1);

/* Key: 0. Value: the ClientHello that `judge_socket` puts together and reads, on this CPU. */
PERCPU_ARRAY(hello_scratch, struct hello_room, 1);

/* --- to user space --- */

/* Key: a `statistic`. Value: its counter since the start. Every program adds; user space reads it for
 * its reports. */
ARRAY(stats, u64, STATS);

/* Plaintext, in order: OPEN, CHUNK, CLOSE, EXIT. Read by relay/forwarder.py, after a pause. */
RING(ring, RING_BYTES);

/* News of processes, read at once (discovery.py): EXEC, MAPPED, LOOKUP, SHUTDOWN and so on, an OPEN
 * again. Records that are reserved and discarded serve as scratch memory. */
RING(process_ring, PROCESS_RING_BYTES);

#ifdef HALTON_BCC
INLINE struct settings *settings_get(u32 *k) { return settings.lookup(k); }
INLINE struct pausing *pausing_get(u32 *k) { return pausing.lookup(k); }
INLINE void pausing_drop(u32 *k) { pausing.delete(k); }
INLINE int paused_set(u32 *k, u64 *v) { return paused.update(k, v); }
INLINE void paused_drop(u32 *k) { paused.delete(k); }
INLINE u64 *stats_get(u32 *k) { return stats.lookup(k); }
INLINE struct connection *blank_connection_get(u32 *k) { return blank_connection.lookup(k); }
INLINE struct thread *blank_thread_get(u32 *k) { return blank_thread.lookup(k); }
INLINE struct rustls *blank_rustls_get(u32 *k) { return blank_rustls.lookup(k); }
INLINE struct tcp_socket *blank_socket_get(u32 *k) { return blank_socket.lookup(k); }
INLINE struct tcp_socket *sockets_get(u64 *k) { return sockets.lookup(k); }
INLINE int sockets_set(u64 *k, struct tcp_socket *v) { return sockets.update(k, v); }
INLINE void sockets_drop(u64 *k) { sockets.delete(k); }
INLINE u8 *quic_sockets_get(struct quic_key *k) { return quic_sockets.lookup(k); }
INLINE void quic_sockets_set(struct quic_key *k, u8 *v) { quic_sockets.update(k, v); }
INLINE u64 *writing_get(u64 *k) { return writing.lookup(k); }
INLINE void writing_set(u64 *k, u64 *v) { writing.update(k, v); }
INLINE void writing_drop(u64 *k) { writing.delete(k); }
INLINE struct host_name *addresses_get(struct address *k) { return addresses.lookup(k); }
INLINE void addresses_set(struct address *k, struct host_name *v) { addresses.update(k, v); }
INLINE struct lookup_call *lookups_get(u64 *k) { return lookups.lookup(k); }
INLINE void lookups_set(u64 *k, struct lookup_call *v) { lookups.update(k, v); }
INLINE void lookups_drop(u64 *k) { lookups.delete(k); }
INLINE struct exec_record *exec_scratch_get(u32 *k) { return exec_scratch.lookup(k); }
INLINE struct hello_room *hello_scratch_get(u32 *k) { return hello_scratch.lookup(k); }
INLINE struct hello_bytes *hellos_get(u64 *k) { return hellos.lookup(k); }
INLINE void hellos_set(u64 *k, struct hello_bytes *v) { hellos.update(k, v); }
INLINE void hellos_drop(u64 *k) { hellos.delete(k); }
INLINE struct birth *births_get(u32 *k) { return births.lookup(k); }
INLINE void births_set(u32 *k, struct birth *v) { births.update(k, v); }
INLINE void births_drop(u32 *k) { births.delete(k); }
INLINE long process_ring_output(void *p, u64 size) { return process_ring.ringbuf_output(p, size, 0); }
INLINE u64 *proofs_get(u32 *k) { return proofs.lookup(k); }
INLINE struct rustls *rustls_connections_get(struct key *k) { return rustls_connections.lookup(k); }
INLINE int rustls_connections_set(struct key *k, struct rustls *v) { return rustls_connections.update(k, v); }
INLINE void rustls_connections_drop(struct key *k) { rustls_connections.delete(k); }
INLINE u64 *rustls_updates_get(struct key *k) { return rustls_updates.lookup(k); }
INLINE void rustls_updates_set(struct key *k, u64 *v) { rustls_updates.update(k, v); }
INLINE void rustls_updates_drop(struct key *k) { rustls_updates.delete(k); }
INLINE struct rustls_call *rustls_calls_get(u64 *k) { return rustls_calls.lookup(k); }
INLINE int rustls_calls_set(u64 *k, struct rustls_call *v) { return rustls_calls.update(k, v); }
INLINE void rustls_calls_drop(u64 *k) { rustls_calls.delete(k); }
INLINE struct rustls_sender *rustls_senders_get(u64 *k) { return rustls_senders.lookup(k); }
INLINE void rustls_senders_set(u64 *k, struct rustls_sender *v) { rustls_senders.update(k, v); }
INLINE void rustls_senders_drop(u64 *k) { rustls_senders.delete(k); }
INLINE struct name_location *name_locations_get(u32 *k) { return name_locations.lookup(k); }
INLINE struct connection *connections_get(struct key *k) { return connections.lookup(k); }
INLINE int connections_add(struct key *k, struct connection *v) { return connections.insert(k, v); }
INLINE void connections_drop(struct key *k) { connections.delete(k); }
INLINE u64 *denied_get(struct key *k) { return denied.lookup(k); }
INLINE void denied_set(struct key *k, u64 *v) { denied.update(k, v); }
INLINE void denied_drop(struct key *k) { denied.delete(k); }
INLINE struct go_call *go_calls_get(struct go_key *k) { return go_calls.lookup(k); }
INLINE int go_calls_set(struct go_key *k, struct go_call *v) { return go_calls.update(k, v); }
INLINE void go_calls_drop(struct go_key *k) { go_calls.delete(k); }
INLINE struct thread *threads_get(u64 *k) { return threads.lookup(k); }
INLINE int threads_set(u64 *k, struct thread *v) { return threads.update(k, v); }
INLINE void threads_drop(u64 *k) { threads.delete(k); }
INLINE u32 *tree_get(u32 *k) { return tree.lookup(k); }
INLINE void tree_set(u32 *k, u32 *v) { tree.update(k, v); }
INLINE void tree_drop(u32 *k) { tree.delete(k); }
INLINE u8 *owners_get(u32 *k) { return owners.lookup(k); }
INLINE void owners_set(u32 *k, u8 *v) { owners.update(k, v); }
INLINE void owners_drop(u32 *k) { owners.delete(k); }
INLINE u8 *uids_get(u32 *k) { return uids.lookup(k); }
INLINE u8 *hosts_get(struct host_key *k) { return hosts.lookup(k); }
INLINE void *ring_reserve(u64 size) { return ring.ringbuf_reserve(size); }
INLINE void ring_submit(void *p) { ring.ringbuf_submit(p, 0); }
INLINE u64 ring_query(u64 what) { return 0; } /* not in bcc: no nudges, so the reader pauses less */
INLINE void *process_ring_reserve(u64 size) { return process_ring.ringbuf_reserve(size); }
INLINE void process_ring_submit(void *p) { process_ring.ringbuf_submit(p, 0); }
INLINE void process_ring_discard(void *p) { process_ring.ringbuf_discard(p, 0); }
#endif

/* ---- who is calling, and are they in scope -------------------------------------------------- */

INLINE void count(u32 statistic, u64 by)
{
	u64 *counter = stats_get(&statistic);
	if (counter)
		__sync_fetch_and_add(counter, by);
}

/* The ids of the calling thread as /proc of the helper shows them (WSL2 and containers nest pid
 * namespaces); a thread of another namespace keeps its global ids. */
INLINE u64 current_ids(struct settings *s)
{
	u64 ids = bpf_get_current_pid_tgid();
	if (s->pid_namespace) {
		struct bpf_pidns_info inner = {};
		if (!bpf_get_ns_current_pid_tgid(s->namespace_device, s->namespace_inode, &inner,
						 sizeof(inner)))
			ids = ((u64)inner.tgid << 32) | inner.pid;
	}
	return ids;
}

/* What the current process, by its id in the helper's namespace, is in the tree: flags and the
 * number of a run (process_tree.py). Set by user space under that id, or by a fork under the global one,
 * which is all that a fork tells of a child. */
INLINE u32 membership(u32 tgid)
{
	u32 *member = tree_get(&tgid);
	if (!member) {
		u64 ids = bpf_get_current_pid_tgid();
		u32 born = (ids >> 32) | TREE_FORKED;
		member = tree_get(&born);
		if (!member) { /* its first thread has ended: each of the others has an entry of its own */
			u32 thread = (u32)ids | TREE_FORKED;
			member = tree_get(&thread);
		}
	}
	return member ? *member : 0;
}

INLINE int in_scope(struct settings *s, u32 tgid)
{
	u32 member = membership(tgid);
	if (member & TREE_EXCLUDED)
		return 0; /* e.g. our own proxy */
	int inside = 0;
	if (s->scope & SCOPE_EVERYONE)
		inside = 1;
	if (s->scope & SCOPE_UIDS) {
		u32 uid = bpf_get_current_uid_gid();
		if (uids_get(&uid))
			inside = 1;
	}
	if ((s->scope & SCOPE_TREES) && (member & TREE_IN_SCOPE) &&
	    (!(s->scope & SCOPE_OWNER) || (u32)bpf_get_current_uid_gid() == s->owner))
		inside = 1;
	if (inside && (s->scope & SCOPE_CGROUP) &&
	    bpf_get_current_ancestor_cgroup_id(s->cgroup_level) != s->cgroup)
		inside = 0;
	return inside;
}

/* ---- records -------------------------------------------------------------------------------- */

INLINE void fill(struct record *r, u32 kind, struct key *key, struct connection *c, u64 now)
{
	r->size = sizeof(*r);
	r->kind = kind;
	r->direction = 0;
	r->flags = c->joined ? FLAG_JOINED : 0;
	r->tgid = key->tgid;
	r->uid = c->uid;
	r->ssl = key->ssl;
	r->opened_ns = c->opened_ns;
	r->at_ns = now;
	r->offset = 0;
	r->length = 0;
	r->captured = 0;
}

struct open_record { /* of an OPEN and a USED; its process's birth is in `head`, too */
	struct record head;
	char comm[16];
	char host[HOST_BYTES_MAX];
	u64 left_ns;
	u64 parent_ns;
	u32 program;
	u32 unused;
};

/* Of the current process; 0 for one that is older than we are. */
INLINE struct birth *current_birth(void)
{
	u32 born = bpf_get_current_pid_tgid() >> 32;
	return births_get(&born);
}

/* Of whom its process is a fork is told as well, should it be gone before it is looked at. Barriers, and
 * copies by the kernel: else clang keeps on its stack what is to be written twice, and bcc's has no room. */
INLINE void describe(struct open_record *r, u32 kind, struct key *key, struct connection *c, u64 now)
{
	asm volatile("" : : : "memory");
	fill(&r->head, kind, key, c, now);
	r->head.size = sizeof(*r);
	r->head.length = membership(key->tgid) >> TREE_FLAG_BITS; /* the run */
	bpf_probe_read_kernel(r->comm, sizeof(r->comm), c->comm);
	bpf_probe_read_kernel(r->host, sizeof(r->host), c->host);
	asm volatile("" : : : "memory");
	r->unused = r->program = 0;
	r->left_ns = r->parent_ns = 0;
	struct birth *birth = current_birth();
	if (!birth)
		return;
	r->head.offset = birth->at_ns;
	r->head.captured = birth->parent;
#ifndef HALTON_BCC /* there the stack has no room: the parent alone is told */
	r->left_ns = birth->left_ns;
	r->parent_ns = birth->parent_ns;
	r->program = birth->program;
#endif
}

/* News of a connection in the other ring, which is read at once: who is it, before it exits? Or that it has
 * sent its first plaintext: it counts as metered from now on. */
INLINE void point_out(u32 kind, struct key *key, struct connection *c, u64 now)
{
	struct open_record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	describe(r, kind, key, c, now);
	process_ring_submit(r);
}

INLINE void announce(struct key *key, struct connection *c)
{
	struct open_record *r = ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_NOTICES_LOST, 1);
		return; /* tried again before the next chunk */
	}
	describe(r, KIND_OPEN, key, c, c->opened_ns);
	c->announced = 1;
	ring_submit(r);
}

struct close_record {
	struct record head;
	u64 received;
	char comm[16]; /* once more, for a reader who has not heard its OPEN (announcements.py) */
	char host[HOST_BYTES_MAX];
};

INLINE int emit_close(struct key *key, struct connection *c)
{
	struct close_record *r = ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_NOTICES_LOST, 1);
		return 0;
	}
	fill(&r->head, KIND_CLOSE, key, c, bpf_ktime_get_ns());
	r->head.size = sizeof(*r);
	r->head.offset = c->sent;
	r->received = c->received;
	__builtin_memcpy(r->comm, c->comm, sizeof(r->comm));
	__builtin_memcpy(r->host, c->host, sizeof(r->host));
	ring_submit(r);
	return 1;
}

INLINE void close_connection(struct key *key, struct connection *c)
{
	if (emit_close(key, c))
		connections_drop(key);
	else
		c->closed = 1; /* kept, so that user space can find its final offsets */
}

INLINE void begin_again(struct key *key, struct connection *c)
{
	emit_close(key, c);
	c->opened_ns = bpf_ktime_get_ns();
	c->sent = 0;
	c->received = 0;
	c->burst = 0;
	c->announced = 0;
	c->linked = 0;
}

INLINE void lost(struct connection *c, u32 statistic, u64 bytes)
{
	c->lost_bytes += bytes;
	count(statistic, bytes);
}

struct chunk {
	struct key *key;
	struct connection *connection;
	u64 *offset;
	u64 address;
	u64 now;
	u32 direction;
};

/* One record of at most `room` plaintext bytes. The sizes of ring records must be constants for
 * the verifier, hence the classes; powers of two waste at most half. */
#define EMIT(room) \
	do { \
		struct { \
			struct record head; \
			char data[room]; \
		} *r = ring_reserve(sizeof(*r)); \
		if (!r) { \
			count(STAT_RING_FULL_RECORDS, 1); \
			lost(c->connection, STAT_RING_FULL_BYTES, length); \
			break; \
		} \
		fill(&r->head, KIND_CHUNK, c->key, c->connection, c->now); \
		r->head.direction = c->direction; \
		r->head.offset = *c->offset; \
		r->head.length = length; \
		u64 wanted = length; \
		if (wanted > room) \
			wanted = room; \
		/* clang knows the clamp is idle and would drop it; the verifier needs it */ \
		asm volatile("" : "+r"(wanted)); \
		if (wanted > room) \
			wanted = room; \
		if (bpf_probe_read_user(r->data, wanted, (void *)c->address)) { \
			lost(c->connection, STAT_COPY_FAILED_BYTES, length); \
			wanted = 0; \
		} \
		r->head.captured = wanted; \
		r->head.size = sizeof(r->head) + wanted; \
		count(STAT_CHUNKS, 1); \
		ring_submit(r); \
	} while (0)

INLINE void emit_tail(struct chunk *c, u64 length)
{
	if (length <= 256)
		EMIT(256);
	else if (length <= 512)
		EMIT(512);
	else if (length <= 1024)
		EMIT(1024);
	else if (length <= 2048)
		EMIT(2048);
	else if (length <= 4096)
		EMIT(4096);
	else if (length <= 8192)
		EMIT(8192);
	else
		EMIT(PIECE_BYTES_MAX);
	*c->offset += length;
}

/* A record without data: user space learns of the hole at once, not with the next chunk. */
INLINE void emit_hole(struct chunk *c, u64 length)
{
	struct record *r = ring_reserve(sizeof(*r));
	if (r) {
		fill(r, KIND_CHUNK, c->key, c->connection, c->now);
		r->direction = c->direction;
		r->offset = *c->offset;
		r->length = length;
		ring_submit(r);
	}
	*c->offset += length;
}

/* The reader lets chunks gather for a while; when this call took the ring past a quarter full it is
 * woken through the other ring, by a record with nothing in it. */
INLINE void nudge(u64 filled_before)
{
	u64 quarter = ring_query(1 /* size */) / 4;
	if (filled_before >= quarter || ring_query(0 /* filled */) < quarter)
		return;
	void *nothing = process_ring_reserve(8);
	if (nothing)
		process_ring_discard(nothing);
}

/* Before a call's bytes are copied: how many, at their end, are too many for one request. */
INLINE u64 begin_copy(struct chunk *c, u64 total)
{
	struct connection *connection = c->connection;
	u32 zero = 0;

	if (!connection->announced)
		announce(c->key, connection);
	if (c->direction != SENT) {
		connection->burst = 0;
		return 0;
	}
	if (!connection->sent)
		point_out(KIND_USED, c->key, connection, c->now);
	struct settings *s = settings_get(&zero);
	connection->burst += total;
	if (!s || connection->burst <= s->request_bytes_max)
		return 0;
	u64 cut = connection->burst - s->request_bytes_max;
	return cut > total ? total : cut;
}

/* What an APART function is given of a connection and a call, beside the SSL object. */
#define OWNER(tgid, direction) ((u64)(direction) << 32 | (tgid))

INLINE int find_chunk(struct chunk *c, u64 owner, u64 address, u64 now)
{
	c->key->tgid = owner;
	c->connection = connections_get(c->key);
	if (!c->connection)
		return 0;
	c->direction = owner >> 32 & 1;
	c->offset = c->direction == SENT ? &c->connection->sent : &c->connection->received;
	c->address = address;
	c->now = now;
	return 1;
}

/* One of the largest pieces, of a call of several. */
APART int copy_large(u64 ssl, u64 owner, u64 address, u64 now)
{
	struct key key = {.ssl = ssl};
	struct chunk chunk = {.key = &key}, *c = &chunk;
	u64 length = PIECE_BYTES_MAX;

	if (!find_chunk(c, owner, address, now))
		return 0;
	EMIT(PIECE_BYTES_MAX);
	*c->offset += PIECE_BYTES_MAX;
	return 0;
}

INLINE void copy_out(struct chunk *c, u64 total)
{
	u64 filled_before = ring_query(0 /* filled */);
	struct connection *connection = c->connection;
	u64 cut = begin_copy(c, total);

	total -= cut; /* one write may hold head and all: the head is needed */
	if (cut)
		count(STAT_REQUEST_CUT_BYTES, cut);
	for (int i = 0; i < PIECES_MAX; i++) {
		if (total <= PIECE_BYTES_MAX)
			break;
		copy_large(c->key->ssl, OWNER(c->key->tgid, c->direction), c->address, c->now);
		c->address += PIECE_BYTES_MAX;
		total -= PIECE_BYTES_MAX;
	}
	if (total > PIECE_BYTES_MAX) {
		lost(connection, STAT_CALL_TOO_LONG_BYTES, total);
		emit_hole(c, total);
	} else if (total) {
		emit_tail(c, total);
	}
	if (cut)
		emit_hole(c, cut);
	nudge(filled_before);
}

/* ---- which host: admit or deny --------------------------------------------------------------- */

/* Scratch memory that a preempted probe owns alone: a record of the process ring, reserved, used
 * and discarded, so never seen by user space. Loops keep their lengths in it and read them back
 * through `volatile`: the verifier then forgets which turn ended the loop, else it would follow
 * the rest of the program once for each. */
struct name {
	u32 length; /* without NUL */
	u32 position;
	char text[HOST_BYTES_MAX];
	char reversed[HOST_BYTES_MAX];
};

struct head {
	struct name name;
	char text[HEAD_BYTES_MAX + 2 * HOST_BYTES_MAX];
};

#define REREAD(x) (*(volatile u32 *)&(x))
#define REREAD_64(x) (*(volatile u64 *)&(x))

/* "a.example." is a.example: the dot says that resolvers are to append nothing. Programs may pass it on. */
INLINE void drop_last_dot(struct name *n)
{
	u32 last = (REREAD(n->length) - 1) & (HOST_BYTES_MAX - 1);
	if (n->text[last] != '.')
		return;
	n->text[last] = 0;
	n->length = last;
}

/* Is the name on the list? Lower-cases it in place, and drops a dot at its end. */
APART int wanted_host(struct name *n)
{
	if (!n)
		return 0;
	struct host_key k;
	u32 length = REREAD(n->length);

	if (length == 0 || length >= HOST_BYTES_MAX - 1)
		return 0;
	drop_last_dot(n);
	__builtin_memset(n->reversed, 0, sizeof(n->reversed));
	for (u32 i = 0; i < HOST_BYTES_MAX - 1; i++) {
		length = REREAD(n->length);
		if (i >= length)
			break;
		u32 from = (length - 1 - i) & (HOST_BYTES_MAX - 1);
		char c = n->text[from];
		if (c >= 'A' && c <= 'Z')
			c += 32;
		n->text[from] = c;
		n->reversed[i] = c;
	}
	k.bits = (REREAD(n->length) + 1) * 8; /* with the NUL: no suffix can pass for a whole name */
	if (bpf_probe_read_kernel(k.reversed, sizeof(k.reversed), n->reversed))
		return 0;
	return hosts_get(&k) != 0;
}

APART int add_connection(u64 ssl, u32 tgid, struct name *n, int joined)
{
	struct key key = {.ssl = ssl, .tgid = tgid};
	u32 zero = 0;
	u8 one = 1;
	struct connection *blank = blank_connection_get(&zero);
	if (!blank || !n)
		return 0;
	int refused = connections_add(&key, blank);
	if (refused == -EEXIST) /* a thread that reads beside one that writes: it was first */
		return 0;
	if (refused) {
		count(STAT_CONNECTION_TABLE_FULL, 1);
		return 0;
	}
	struct connection *c = connections_get(&key);
	if (!c)
		return 0;
	c->opened_ns = bpf_ktime_get_ns();
	c->uid = bpf_get_current_uid_gid();
	c->joined = joined;
	bpf_get_current_comm(c->comm, sizeof(c->comm));
	bpf_probe_read_kernel(c->host, sizeof(c->host), n->text);
	owners_set(&key.tgid, &one);
	denied_drop(&key);
	count(STAT_ADMITTED, 1);
	point_out(KIND_OPEN, &key, c, c->opened_ns);
	announce(&key, c);
	return 0;
}

INLINE struct connection *admit(struct key *key, struct name *n, int joined)
{
	add_connection(key->ssl, key->tgid, n, joined);
	return connections_get(key);
}

INLINE void deny(struct key *key, u64 origin)
{
	denied_set(key, &origin);
	count(STAT_DENIED, 1);
}

/* The client names the host it is about to connect to: a new connection, whatever was before. */
INLINE int host_named(u64 ssl, u64 address, u64 length_max)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	struct key key = {.ssl = ssl, .tgid = current_ids(s) >> 32};
	struct connection *old = connections_get(&key);
	if (old)
		close_connection(&key, old);
	if (!in_scope(s, key.tgid) || !address)
		return 0;
	struct name *n = process_ring_reserve(sizeof(*n));
	if (!n) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0; /* its first request head will be judged instead */
	}
	__builtin_memset(n->text, 0, sizeof(n->text));
	if (length_max >= sizeof(n->text))
		length_max = sizeof(n->text) - 1;
	asm volatile("" : "+r"(length_max));
	length_max &= HOST_BYTES_MAX - 1;
	long length = bpf_probe_read_user_str(n->text, length_max + 1, (void *)address);
	n->length = length > 0 ? length - 1 : 0;
	if (wanted_host(n))
		admit(&key, n, 0);
	else
		deny(&key, DENIED);
	process_ring_discard(n);
	return 0;
}

/* ---- where the library keeps the name -----------------------------------------------------------
 *
 * A library copies the name that it is given, and keeps a pointer to the copy in the SSL object, at
 * an offset that is the same for every connection of one build. We learn it by watching: at the first
 * write of a connection whose name we saw, the object is searched, word by word, for a pointer to
 * that name. The same offset in NAME_VOTES_MIN connections is known; a known one at which another
 * name stands is given up for good. Words go to registers here and nowhere else: the object leads to
 * the connection's keys. User space keeps what was learned, by build (name_locations.py). A search takes
 * some 50 us, twice for a build; to look whether the name stands there, at each new connection, 1 us. */

INLINE struct name_location *name_location(u64 cookie)
{
	u32 number = cookie & COOKIE_FILE;
	return number ? name_locations_get(&number) : 0;
}

/* Reads the name that stands at an offset of an SSL object into `text`, which is all NUL. Its length
 * with the NUL; 1 when there is none, less when it cannot be read. */
INLINE long name_at(char *text, u64 ssl, u32 offset)
{
	u64 pointer = 0;
	if (bpf_probe_read_user(&pointer, sizeof(pointer), (void *)(ssl + offset)))
		return 0;
	return pointer ? bpf_probe_read_user_str(text, HOST_BYTES_MAX, (void *)pointer) : 1;
}

/* The name that the library itself keeps; 0 when its location is not known, or nothing stands there. */
INLINE int own_name(struct name *n, u64 ssl, struct name_location *p)
{
	if (!p || p->state != NAME_KNOWN)
		return 0;
	__builtin_memset(n->text, 0, sizeof(n->text));
	long length = name_at(n->text, ssl, p->offset);
	n->length = length > 1 ? length - 1 : 0;
	return length > 1;
}

/* Is there more to be known of an unnamed connection than when it was judged? */
INLINE int may_be_named(u64 cookie)
{
	struct name_location *p = name_location(cookie);
	return p && p->state != NAME_SOUGHT;
}

#define FOLDED(a, b) (((a) ^ (b)) & 0xdfdfdfdfdfdfdfdfULL) /* 0: the same but for case */

/* In a block of the object, the first offset but 0 at which a pointer to a text stands that begins like
 * the name; 0: none. */
APART int find_name_in(u64 block, u64 beginning)
{
	u64 word = 0, text = 0;
	for (u32 at = 0; at < NAME_BLOCK_BYTES; at += 8) {
		if (bpf_probe_read_user(&word, sizeof(word), (void *)(block + at)))
			break; /* behind the object, or never written to: each try costs a fault */
		if ((word & 7) || !(word & 0xffff) || word >> 16 == 0)
			continue; /* no allocator gave it: to read there would cost a fault */
		bpf_probe_read_user(&text, sizeof(text), (void *)word); /* 0 when it cannot */
		if (!FOLDED(text, beginning))
			return at;
	}
	return 0;
}

/* The same of the whole object. */
INLINE u32 find_name(u64 ssl, struct connection *c)
{
	/* Blocks overlap by a word: 0 says that nothing was found, so a block's first word is not looked at. */
	for (u32 at = 0; at < NAME_SCAN_BYTES; at += NAME_BLOCK_BYTES - 8) {
		u32 found = find_name_in(ssl + at, *(u64 *)c->host);
		if (found)
			return at + found;
	}
	return 0;
}

/* 1: the connection's name stands there, 0: it does not, -1: that cannot be read. */
INLINE int same_name(u64 ssl, u32 offset, struct connection *c)
{
	u64 text[HOST_BYTES_MAX / 8] = {}, differs = 0;
	long length = name_at((char *)text, ssl, offset);
	if (length < 1)
		return -1;
	char *last = (char *)text + ((length - 2) & (HOST_BYTES_MAX - 1));
	if (*last == '.') /* `drop_last_dot` */
		*last = 0;
#pragma unroll
	for (int i = 0; i < HOST_BYTES_MAX / 8; i++)
		differs |= FOLDED(text[i], ((u64 *)c->host)[i]);
	return !differs;
}

/* Tell user space a location that is known now (or, with offset 0, no longer believed). */
INLINE void tell_location(u64 cookie, u32 offset)
{
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->size = sizeof(*r);
	r->kind = KIND_LEARNED;
	r->offset = cookie & COOKIE_FILE;
	r->length = offset;
	process_ring_submit(r);
}

INLINE void count_vote(struct name_location *p, u32 offset, u64 cookie)
{
	u32 number = cookie & COOKIE_FILE;
	u64 *proof = proofs_get(&number);

	p->votes = offset == p->offset ? p->votes + 1 : 1;
	p->offset = offset;
	if (p->votes < NAME_VOTES_MIN)
		return;
	/* Functions found by structure must have passed HTTP before they are believed in anything. */
	if ((cookie & COOKIE_UNPROVED) && (!proof || (*proof & 3) != 3))
		return;
	p->state = NAME_KNOWN;
	tell_location(cookie, offset);
}

/* Before the first write of a connection whose name we saw. */
APART int learn_name_location(u64 ssl, u32 tgid, u64 cookie)
{
	struct key key = {.ssl = ssl, .tgid = tgid};
	struct connection *c = connections_get(&key);
	struct name_location *p = name_location(cookie);
	if (!c || !p || p->state == NAME_GIVEN_UP || p->voter == c->opened_ns || !c->host[7])
		return 0;
	p->voter = c->opened_ns;
	u32 offset = p->offset;
	if (p->state == NAME_SOUGHT) {
		offset = find_name(ssl, c);
		p->scans += 1;
	}
	int same = offset ? same_name(ssl, offset, c) : -1;
	if (p->state == NAME_KNOWN) {
		if (same == 0) {
			p->state = NAME_GIVEN_UP;
			tell_location(cookie, 0);
		}
		return 0;
	}
	if (same == 1)
		count_vote(p, offset, cookie);
	if (p->state == NAME_SOUGHT && p->scans >= NAME_SCANS_MAX)
		p->state = NAME_GIVEN_UP;
	return 0;
}

/* ---- a connection that we saw no name of ------------------------------------------------------- */

INLINE int starts_a_request(const char *t)
{
	u32 word = *(u32 *)t;
	return word == 0x54534f50 /* POST */ || word == 0x20544547 /* GET_ */ ||
	       word == 0x20545550 /* PUT_ */ || word == 0x44414548 /* HEAD */ ||
	       word == 0x43544150 /* PATC */ || word == 0x454c4544 /* DELE */ ||
	       word == 0x4954504f /* OPTI */;
}

#define HOST_FIELD 0x0a686f73743aULL /* "\nhost:" */
#define HOST_FIELD_BYTES 6
#define HOST_FIELD_BITS 0xffdfdfdfdfffULL /* all but the case of letters */

/* In a block of the head, where the name after "\nHost:" starts, 0 if there is none. One branch a turn and
 * few instructions: the verifier goes through every turn, and keeps every branch not yet taken on a stack
 * of 8192. */
APART int find_host_in(struct head *h, u32 block)
{
	u64 last = 0; /* six bytes, and older ones that do not count */
	if (!h)
		return 0;
	for (u32 i = 0; i < HEAD_BLOCK_BYTES; i++) {
		u32 at = (block + i) & (HEAD_BYTES_MAX - 1);
		last = last << 8 | (u8)h->text[at];
		if (!((last ^ HOST_FIELD) & HOST_FIELD_BITS))
			return at + 1;
	}
	return 0;
}

/* The same of the whole head. Blocks overlap by five bytes, so that a field at a border is found, once. */
INLINE void find_host(struct head *h)
{
	h->name.position = 0;
	for (u32 block = 0; block + HEAD_BLOCK_BYTES <= HEAD_BYTES_MAX - 3; block += HEAD_BLOCK_BYTES - HOST_FIELD_BYTES + 1) {
		int found = find_host_in(h, block);
		if (found > 0) {
			h->name.position = found;
			break;
		}
	}
}

INLINE void copy_name(struct head *h)
{
	u32 start = REREAD(h->name.position) & (HEAD_BYTES_MAX - 1);
	__builtin_memset(h->name.text, 0, sizeof(h->name.text));
	h->name.length = 0;
	if (h->text[start] == ' ')
		start += 1;
	for (u32 i = 0; i < HOST_BYTES_MAX; i++) {
		char at = h->text[start + i];
		if (at <= ' ' || at == ':')
			break;
		h->name.text[i] = at;
		h->name.length = i + 1;
	}
	h->name.position = start + REREAD(h->name.length); /* behind it */
}

/* A HEADERS frame that ends its headers, on a client's stream: how HTTP/2 begins a request. A
 * server's answer looks the same, but for its first field, :status (RFC 7541, A: entries 8 to 14). */
INLINE int opens_http2_stream(const u8 *frame, u64 address)
{
	u8 field = 0;
	if (frame[0] || frame[3] != 1 || !(frame[4] & 4) || (frame[4] & ~0x2d) || (frame[5] & 0x80) ||
	    !(frame[8] & 1))
		return 0;
	address += 9 + (frame[4] & 8 ? 1 : 0) + (frame[4] & 0x20 ? 5 : 0); /* padding, priority */
	if (bpf_probe_read_user(&field, sizeof(field), (void *)address))
		return 0;
	if (field & 0x80) /* indexed */
		return field < 0x88 || field > 0x8e;
	field &= field & 0x40 ? 0x3f : 0x0f; /* literal: with indexing, or without */
	return field < 8 || field > 14;
}

/* Is there the beginning of an HTTP/2 request among a write's first frames? Clients send what they
 * owe the server (WINDOW_UPDATE, PING, SETTINGS) and what other streams have left in one write. */
INLINE int begins_http2_request(u64 address, u64 total)
{
	u8 frame[9] = {};
	u64 at = 0;
	for (int i = 0; i < HTTP2_FRAMES_MAX; i++) {
		if (at + sizeof(frame) >= total ||
		    bpf_probe_read_user(frame, sizeof(frame), (void *)(address + at)))
			return 0;
		if (opens_http2_stream(frame, address + at))
			return 1;
		if (frame[3] > 9 || (frame[5] & 0x80))
			return 0; /* no frame at all */
		at += sizeof(frame) + ((u64)frame[0] << 16 | (u64)frame[1] << 8 | frame[2]);
	}
	return 0;
}

/* Once a connection: it is not copied until the location of its name is known, if ever. */
INLINE void unnamed_http2(struct key *key, u64 cookie)
{
	struct name_location *p = name_location(cookie);
	u64 as = p && p->state == NAME_SOUGHT ? UNNAMED_SO_FAR : DENIED;
	u64 *before = denied_get(key);
	int told = before != 0;

	denied_set(key, &as);
	if (told)
		return;
	count(STAT_HTTP2_WITHOUT_NAME, 1);
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->size = sizeof(*r);
	r->kind = KIND_UNNAMED;
	r->tgid = key->tgid;
	r->ssl = key->ssl;
	process_ring_submit(r);
}

/* The Host of a request head; 0 when there is none in what was read of it. */
APART int read_host(struct head *h, u64 address, u64 total)
{
	if (!h)
		return 0;
	u64 wanted = total;
	if (wanted > HEAD_BYTES_MAX)
		wanted = HEAD_BYTES_MAX;
	asm volatile("" : "+r"(wanted));
	if (wanted > HEAD_BYTES_MAX)
		wanted = HEAD_BYTES_MAX;
	count(STAT_HEADS_JUDGED, 1);
	if (bpf_probe_read_user(h->text, wanted, (void *)address))
		return 0;
	h->text[wanted] = 0; /* what follows is another record's past */
	find_host(h);
	if (REREAD(h->name.position) == 0 || REREAD(h->name.position) >= wanted) {
		count(STAT_HEADS_WITHOUT_HOST, 1);
		return 0;
	}
	copy_name(h);
	/* What ends where the reading did may be half a name, which is another one's: the next request tells. */
	if (REREAD(h->name.position) >= wanted) {
		count(STAT_HEADS_WITHOUT_HOST, 1);
		return 0;
	}
	return 1;
}

/* A write on a connection whose name we never saw. Only one that begins a request is looked at: the
 * server's end of a connection has the same name, and writes answers. */
INLINE struct connection *judge(struct key *key, u64 address, u64 total, u64 cookie)
{
	struct connection *c = 0;
	char first[16] __attribute__((aligned(8))) = {};

	if (total < sizeof(first) || bpf_probe_read_user(first, sizeof(first), (void *)address))
		return 0;
	int http1 = starts_a_request(first);
	if (!http1 && *(u64 *)first != HTTP2_PREFACE && !begins_http2_request(address, total))
		return 0;
	struct head *h = process_ring_reserve(sizeof(*h));
	if (!h) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	int named = own_name(&h->name, key->ssl, name_location(cookie)) ||
		    (http1 && read_host(h, address, total));
	if (!named) {
		if (!http1)
			unnamed_http2(key, cookie);
	} else if (wanted_host(&h->name)) {
		c = admit(key, &h->name, 1);
	} else {
		deny(key, DENIED);
	}
	process_ring_discard(h);
	return c;
}

/* ---- proof ------------------------------------------------------------------------------------
 *
 * Functions found by structure (boringssl.py) have a cookie that says so. The first bytes of each of
 * their connections must be HTTP, each way; else nothing of the connection is copied. Where functions
 * of a file never passed HTTP, user space removes its probes. Joined connections are no test: the head
 * of a request admitted them. */

INLINE int looks_like_http(const char *first, u32 direction)
{
	u32 word = *(u32 *)first;
	if (direction == SENT)
		return starts_a_request(first) || word == (u32)HTTP2_PREFACE;
	/* a response, or the SETTINGS that an HTTP/2 server opens with, of less than 64 KiB */
	return word == 0x50545448 /* HTTP */ || (first[0] == 0 && first[3] == 4);
}

INLINE int proved(struct chunk *c, u64 total, u64 cookie)
{
	char first[4] = {};
	u32 number = cookie & COOKIE_FILE, bit = 1 << (c->direction & 1);
	u64 *proof = proofs_get(&number);

	if (!proof || *c->offset || c->connection->joined || total < sizeof(first) ||
	    bpf_probe_read_user(first, sizeof(first), (void *)c->address))
		return 1;
	if (looks_like_http(first, c->direction)) {
		if (!(*proof & bit))
			*proof |= bit; /* set by whoever comes first; twice does no harm */
		return 1;
	}
	count(STAT_NOT_HTTP, 1);
	if (!(*proof & bit)) {
		struct record *r = process_ring_reserve(sizeof(*r));
		if (r) {
			fill(r, KIND_NOT_HTTP, c->key, c->connection, c->now);
			r->offset = number;
			process_ring_submit(r);
		} else {
			count(STAT_PROCESS_RING_FULL, 1);
		}
	}
	if (c->connection->announced)
		close_connection(c->key, c->connection);
	else
		connections_drop(c->key);
	deny(c->key, DENIED);
	return 0;
}

/* What a call has passed, of a connection that is known. */
APART int take(u64 ssl, u64 owner, u64 address, u64 total, u64 cookie)
{
	struct key key = {.ssl = ssl};
	struct chunk chunk = {.key = &key};

	if (!total || total > 0x7fffffff || !find_chunk(&chunk, owner, address, bpf_ktime_get_ns()))
		return 0;
	if (!(cookie & COOKIE_UNPROVED) || proved(&chunk, total, cookie))
		copy_out(&chunk, total);
	return 0;
}

/* ---- near a limit ------------------------------------------------------------------------------
 *
 * A process that is near what it may spend is stopped as it begins a request, before a byte of that is
 * encrypted. User space lets it go on once the answers that it has read are counted (pausing.py). The
 * signal is taken on the way back from the probe. It comes before the news of it: whoever hears that may
 * let the process go on at once. Only processes that user space has named, of the user who may stop them
 * anyway, and no longer than user space says that it is there. */

/* A request's head, the beginning of an HTTP/2 request, or a message of a WebSocket. */
APART int begins_request(u64 address, u64 total)
{
	char first[8] __attribute__((aligned(8))) = {};

	if (total < sizeof(first) || bpf_probe_read_user(first, sizeof(first), (void *)address))
		return 0;
	if (starts_a_request(first))
		return 1;
	u32 frame = (u8)first[0], masked = (u8)first[1] & 0x80, kind = frame & 0x0f;
	if ((frame & 0x80) && masked && (kind == 1 || kind == 2))
		return 1;
	if (*(u64 *)first == HTTP2_PREFACE) {
		address += HTTP2_PREFACE_BYTES;
		total = total > HTTP2_PREFACE_BYTES ? total - HTTP2_PREFACE_BYTES : 0;
	}
	return begins_http2_request(address, total);
}

INLINE void pause_before_request(struct key *key, struct connection *c, u64 address, u64 total)
{
	struct pausing *p = pausing_get(&key->tgid);
	u64 now = bpf_ktime_get_ns();

	if (!p || p->uid != (u32)bpf_get_current_uid_gid() || now >= p->until_ns ||
	    !begins_request(address, total))
		return;
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) { /* nobody would hear of it */
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	if (send_signal(STOP_SIGNAL)) {
		process_ring_discard(r);
		return;
	}
	/* Behind the signal: who finds it dropped was let go on since. User space names fewer than fit. */
	paused_set(&key->tgid, &now);
	fill(r, KIND_PAUSED, key, c, now);
	process_ring_submit(r);
}

/* ---- reads and writes ------------------------------------------------------------------------ */

INLINE int enter(struct registers *r, u32 direction, u64 length_pointer, u64 length)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s);
	u64 sp = ENTRY_SP_AT_ENTRY(r);
	struct key key = {.ssl = ARG1(r), .tgid = ids >> 32};

	struct connection *c = connections_get(&key);
	if (!c) {
		if (direction == RECEIVED || !in_scope(s, key.tgid))
			return 0;
		u64 *denied_as = denied_get(&key);
		if (denied_as && (*denied_as != UNNAMED_SO_FAR || !may_be_named(bpf_get_attach_cookie(r))))
			return 0;
	} else if (direction == SENT && !c->sent && !c->joined) {
		learn_name_location(key.ssl, key.tgid, bpf_get_attach_cookie(r));
	}
	if (c && direction == SENT && !c->linked)
		writing_set(&ids, &key.ssl);
	struct thread *t = threads_get(&ids);
	if (!t) {
		struct thread *blank = blank_thread_get(&zero);
		if (!blank)
			return 0;
		if (threads_set(&ids, blank)) {
			count(STAT_THREAD_TABLE_FULL, 1);
			return 0;
		}
		t = threads_get(&ids);
		if (!t)
			return 0;
	}
	/* Frames at or below this stack pointer have ended without a return probe; one just above,
	 * for the same SSL*, is SSL_write_ex around SSL_write_ex2 or the like: counted once, there. */
	struct frame *slot = 0;
#pragma unroll
	for (int i = 0; i < FRAMES_MAX; i++) {
		struct frame *f = &t->frame[i];
		if (f->sp && f->sp <= sp)
			f->sp = 0;
		if (f->sp && f->ssl == key.ssl && f->direction == direction &&
		    f->sp - sp < NESTED_STACK_BYTES)
			return 0;
		if (!f->sp && !slot)
			slot = f;
	}
	if (!slot)
		slot = &t->frame[0];
	slot->sp = sp;
	slot->ssl = key.ssl;
	slot->buffer = ARG2(r);
	slot->length_pointer = length_pointer;
	slot->direction = direction;
	if (c && direction == SENT)
		pause_before_request(&key, c, ARG2(r), length);
	return 0;
}

/* Of a call that says through a pointer how much it was, or by what it returns. */
INLINE int leave(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s);
	struct thread *t = threads_get(&ids);
	if (!t)
		return 0;
	u64 sp = ENTRY_SP_AT_RETURN(r);
	struct frame f = {};
#pragma unroll
	for (int i = 0; i < FRAMES_MAX; i++) {
		if (t->frame[i].sp == sp) {
			f = t->frame[i];
			t->frame[i].sp = 0;
		}
	}
	if (!f.sp)
		return 0;
	u64 total = 0;
	if (f.length_pointer) {
		if ((int)RESULT(r) != 1 || bpf_probe_read_user(&total, sizeof(total), (void *)f.length_pointer))
			return 0;
	} else {
		if ((int)RESULT(r) <= 0)
			return 0;
		/* As above, by way of memory: of a number in a register the verifier would follow every
		 * class of sizes through all that comes. */
		u64 result = (u32)RESULT(r);
		bpf_probe_read_kernel(&total, sizeof(total), &result);
	}
	if (total == 0 || total > 0x7fffffff)
		return 0;
	struct key key = {.ssl = f.ssl, .tgid = ids >> 32};
	u64 cookie = bpf_get_attach_cookie(r);
	struct connection *c = connections_get(&key);
	if (!c && f.direction == SENT)
		c = judge(&key, f.buffer, total, cookie);
	if (!c)
		return 0;
	take(key.ssl, OWNER(key.tgid, f.direction), f.buffer, total, cookie);
	return 0;
}

SECTION("uprobe/enter_read") int enter_read(struct registers *r) { return enter(r, RECEIVED, 0, 0); }
SECTION("uprobe/enter_read_ex") int enter_read_ex(struct registers *r) { return enter(r, RECEIVED, ARG4(r), 0); }
SECTION("uprobe/enter_write") int enter_write(struct registers *r) { return enter(r, SENT, 0, (u32)ARG3(r)); }
SECTION("uprobe/enter_write_ex") int enter_write_ex(struct registers *r) { return enter(r, SENT, ARG4(r), ARG3(r)); }
SECTION("uprobe/enter_write_ex2") int enter_write_ex2(struct registers *r) { return enter(r, SENT, ARG5(r), ARG3(r)); }
SECTION("uprobe/leave_plain") int leave_plain(struct registers *r) { return leave(r); }

#if !IS_BCC
/* All three in one, which takes a third of the verifier's time: where the cookie has the program's
 * number, that says which it is (`ANY_WRITE` in loader.py). */
#define NUMBER_WRITE_EX 2
#define NUMBER_WRITE_EX2 4
SECTION("uprobe/enter_any_write") int enter_any_write(struct registers *r)
{
	u64 number = bpf_get_attach_cookie(r) >> (64 - COOKIE_PROGRAM_BITS);
	u64 fourth = ARG4(r), fifth = ARG5(r);
	/* Else clang chooses a register's address, which the verifier refuses. */
	asm volatile("" : "+r"(fourth), "+r"(fifth));
	u64 pointer = number == NUMBER_WRITE_EX ? fourth : number == NUMBER_WRITE_EX2 ? fifth : 0;
	return enter(r, SENT, pointer, number ? ARG3(r) : (u32)ARG3(r));
}
#endif

/* ---- Go: crypto/tls.(*Conn).Read and .Write ---------------------------------------------------
 *
 * No return probes: Go moves stacks, and would crash on the address they swap in. Each RET has a
 * probe of its own. The probe's cookie holds two offsets (golang.py): Conn.config << 32 |
 * Config.ServerName; 0 when unknown for that Go, and then the request's head decides. A *Conn used
 * again without a Close shows in the name's address, or in another HTTP/2 preface. */

#define GO_FORK (1ULL << 48) /* the offsets are a guess: other places are looked at, too */
#define GO_WRAPPED (1ULL << 49) /* the method is of a struct that begins with a pointer to the Conn */

/* The *Conn of a call; 0 when it cannot be read. */
INLINE u64 go_connection(struct registers *r, u64 cookie)
{
	u64 connection = GO_CONNECTION(r);
	if ((cookie & GO_WRAPPED) && bpf_probe_read_user(&connection, sizeof(connection), (void *)connection))
		return 0;
	return connection;
}

INLINE int may_be_a_host(u64 *name)
{
	char last = 0;
	if (!name[0] || !name[1] || name[1] >= HOST_BYTES_MAX ||
	    bpf_probe_read_user(&last, 1, (void *)(name[0] + name[1] - 1)))
		return 0;
	u8 letter = (u8)((last | 0x20) - 'a'), digit = (u8)(last - '0');
	return letter < 26 || digit < 10;
}

/* Config.ServerName of a connection into a Go string: its address, its length. Both stay 0 when there
 * is none. In a fork's Config it may stand one pointer further, and older Conns have their Config one
 * pointer before. What is read from a wrong place is no text that ends as a host does. */
INLINE void go_name(u64 *name, u64 connection, u64 cookie)
{
	u64 at = (cookie >> 32) & 0xffff;
	u32 in_config = cookie;
#pragma unroll
	for (int i = 0; i < 4; i++) {
		u64 config = 0;
		if (!bpf_probe_read_user(&config, sizeof(config), (void *)(connection + at - 8 * (i >> 1))) && config)
			bpf_probe_read_user(name, 16, (void *)(config + in_config + 8 * (i & 1)));
		if (!(cookie & GO_FORK) || may_be_a_host(name))
			return;
		name[0] = name[1] = 0;
	}
}

INLINE int enter_go(struct registers *r, u32 direction)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s);
	u32 tgid = ids >> 32;
	u64 cookie = OWN_PART(bpf_get_attach_cookie(r));
	struct key key = {.ssl = go_connection(r, cookie), .tgid = tgid};
	struct go_key call_key = {.goroutine = GO_GOROUTINE(r), .tgid = tgid, .direction = direction};
	struct go_call call = {.connection = key.ssl, .buffer = GO_BUFFER(r)};
	struct connection *c = connections_get(&key);
	u64 name[2] = {};

	if (cookie)
		go_name(name, key.ssl, cookie);
	/* No origin yet: a goroutine that reads beside one that writes admits it at this moment. */
	if (c && c->origin != name[0] && (c->origin || c->joined)) {
		close_connection(&key, c);
		c = 0;
	}
	if (!c) {
		u64 *origin = denied_get(&key);
		if ((origin && *origin == name[0]) || !in_scope(s, tgid))
			return 0;
		/* A Read admits nothing: one that begins after Close would bring the connection back. It
		 * is noted all the same, as the Write that admits may come while it waits. */
		if (direction == SENT && name[0] && name[1] && name[1] < HOST_BYTES_MAX) {
			struct name *n = process_ring_reserve(sizeof(*n));
			if (!n) {
				count(STAT_PROCESS_RING_FULL, 1);
				return 0;
			}
			__builtin_memset(n->text, 0, sizeof(n->text));
			u64 length = name[1];
			asm volatile("" : "+r"(length));
			length &= HOST_BYTES_MAX - 1;
			bpf_probe_read_user(n->text, length, (void *)name[0]);
			n->length = length;
			u64 first = 0;
			bpf_probe_read_user(&first, sizeof(first), (void *)call.buffer);
			if (wanted_host(n)) /* joined when what it writes is no beginning */
				c = admit(&key, n, first != HTTP2_PREFACE && !starts_a_request((char *)&first));
			else
				deny(&key, name[0]);
			process_ring_discard(n);
			if (!c)
				return 0;
			c->origin = name[0];
		}
	} else if (direction == SENT && c->sent) {
		u64 first = 0;
		bpf_probe_read_user(&first, sizeof(first), (void *)call.buffer);
		if (first == HTTP2_PREFACE)
			begin_again(&key, c);
	}
	if (go_calls_set(&call_key, &call))
		count(STAT_THREAD_TABLE_FULL, 1);
	if (c && direction == SENT)
		pause_before_request(&key, c, GO_BUFFER(r), GO_LENGTH(r));
	return 0;
}

INLINE int leave_go(struct registers *r, u32 direction)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u32 tgid = current_ids(s) >> 32;
	struct go_key call_key = {.goroutine = GO_GOROUTINE(r), .tgid = tgid, .direction = direction};
	struct go_call *call = go_calls_get(&call_key);
	if (!call)
		return 0;
	u64 buffer = call->buffer, total = RESULT(r);
	struct key key = {.ssl = call->connection, .tgid = tgid};
	go_calls_drop(&call_key);
	if (total == 0 || total > 0x7fffffff)
		return 0;
	struct connection *c = connections_get(&key);
	if (!c && direction == SENT)
		c = judge(&key, buffer, total, 0);
	if (!c)
		return 0;
	take(key.ssl, OWNER(tgid, direction), buffer, total, 0);
	return 0;
}

/* Also SSL_free: the pointer may serve another connection next. */
INLINE int forget(u64 pointer)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	struct key key = {.ssl = pointer, .tgid = current_ids(s) >> 32};
	struct connection *c = connections_get(&key);
	if (c)
		close_connection(&key, c);
	else
		denied_drop(&key);
	return 0;
}

SECTION("uprobe/enter_go_close") int enter_go_close(struct registers *r) { return forget(go_connection(r, OWN_PART(bpf_get_attach_cookie(r)))); }
SECTION("uprobe/enter_go_read") int enter_go_read(struct registers *r) { return enter_go(r, RECEIVED); }
SECTION("uprobe/enter_go_write") int enter_go_write(struct registers *r) { return enter_go(r, SENT); }
SECTION("uprobe/leave_go_read") int leave_go_read(struct registers *r) { return leave_go(r, RECEIVED); }
SECTION("uprobe/leave_go_write") int leave_go_write(struct registers *r) { return leave_go(r, SENT); }

/* ---- rustls ----------------------------------------------------------------------------------
 *
 * rustls encrypts and decrypts each record by a call through a box. The probes are in the middle of
 * functions: just before these calls, and behind the one that decrypts (rustls_layer.py has the layouts).
 * A connection moves in memory, its boxes do not: it is known by its encrypter. Boxes are used again by
 * other connections, often at once. So a record belongs to a known connection only if both boxes and both
 * counters are what they must be after the record before; else the connection has ended for us, and what
 * comes is judged anew. After a KeyUpdate, and only then, another box may follow, whose counter is 0.
 *
 * The host is the name that rustls was asked to connect to. TLS 1.3 keeps it in the object that handles
 * traffic, two pointers away from the boxes, which is in its place while data is sent. Where that is in a
 * build we learn as with other libraries ("where the library keeps the name"), from the first connection:
 * by the Host of a request, or by the server name that the same thread sends on its socket after the
 * handshake's last record. Of known versions it is assumed, and has to be shown once all the same. */

enum rustls_content { RUSTLS_ALERT = 1, RUSTLS_HANDSHAKE = 2, RUSTLS_DATA = 3 };
#define RUSTLS_ENCRYPTER 0x10 /* in what the cookie leads to */
#define RUSTLS_ID (1ULL << 63) /* in a connection's key: no address has it */
#define RUSTLS_KEY_UPDATE 24
#define FIRST_MISS 0x100 /* in a file's proof: above its bits connections with a missed record are counted */

struct rustls_message { /* 0, address, length, where it is one piece: that is made to look like this */
	u64 pieces; /* address and length of each */
	u64 count;
	u64 from; /* in all of them, one behind the other */
	u64 to;
	u8 content;
	u8 unused[7];
};

struct piece {
	u64 address;
	u64 length;
};

struct rustls_result {
	u8 tag;
	u8 unused[7];
	u64 address;
	u64 length;
	u8 content;
	u8 unused_too[7];
};

INLINE s64 signed_bits(u64 word, u32 from, u32 bits)
{
	return (s64)(word << (64 - from - bits)) >> (64 - bits);
}

INLINE u64 register_at(struct registers *r, u64 number)
{
	u64 value = 0;
	bpf_probe_read_kernel(&value, sizeof(value), (char *)r + 8 * (number & 31));
	return value;
}

INLINE u64 rustls_base(struct registers *r, u64 cookie)
{
	return register_at(r, cookie >> RUSTLS_LAYER) + 8 * signed_bits(cookie, RUSTLS_REST, 12);
}

INLINE u64 rustls_object(struct registers *r, u64 cookie)
{
	return register_at(r, cookie >> RUSTLS_OBJECT) + signed_bits(cookie, RUSTLS_OFFSET, 16);
}

/* --- which connection --- */

/* A new connection's record passed no probe: what was found in this file is not all there is. */
INLINE void tell_missed(struct connection *c, u64 cookie)
{
	u32 number = cookie & COOKIE_FILE;
	u64 *proof = proofs_get(&number);

	count(STAT_RECORDS_MISSED, 1);
	if (!proof || c->joined)
		return;
	*proof += FIRST_MISS;
	if (*proof / FIRST_MISS != RUSTLS_MISSES_MAX)
		return;
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		*proof -= FIRST_MISS;
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->size = sizeof(*r);
	r->kind = KIND_RECORDS_MISSED;
	r->offset = number;
	process_ring_submit(r);
}

/* `sent`: the number of the record that is sent now, or next. With 0 the box is another connection's. */
INLINE void rustls_end(struct key *key, struct rustls *known, u64 sent, u64 cookie)
{
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct connection *c = known->state == RUSTLS_ADMITTED ? connections_get(&id) : 0;
	rustls_connections_drop(key);
	if (!c)
		return;
	if (sent)
		tell_missed(c, cookie);
	close_connection(&id, c);
}

/* Is this the record after the last one? */
INLINE int rustls_follows(struct rustls *known, struct rustls_layer *layer, u64 sent)
{
	if (sent != known->next_sent)
		return 0;
	if (known->state != RUSTLS_ADMITTED)
		return 1;
	if (known->received_update && !layer->received) {
		known->received_update = 0;
		known->decrypter = layer->decrypter;
		known->next_received = 0;
	}
	return layer->decrypter == known->decrypter && layer->received == known->next_received;
}

/* The connection that sent a KeyUpdate, by its decrypter; or by where it is, if that changed as well. */
INLINE struct rustls *rustls_updated(struct key *key, struct rustls_layer *layer, u64 base)
{
	struct key by_decrypter = {.ssl = layer->decrypter, .tgid = key->tgid};
	struct key by_base = {.ssl = base, .tgid = key->tgid};
	u64 *id = rustls_updates_get(&by_decrypter);

	if (!id)
		id = rustls_updates_get(&by_base);
	if (!id)
		return 0;
	struct key old = {.ssl = *id, .tgid = key->tgid};
	rustls_updates_drop(&by_decrypter);
	rustls_updates_drop(&by_base);
	struct rustls *known = rustls_connections_get(&old);
	if (!known)
		return 0;
	long failed = rustls_connections_set(key, known);
	rustls_connections_drop(&old);
	return failed ? 0 : rustls_connections_get(key);
}

/* A KeyUpdate is sent: what comes next is encrypted by another box, and this one may be anybody's. */
INLINE void rustls_await_update(struct key *key, struct rustls *known, u64 base)
{
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct key by_decrypter = {.ssl = known->decrypter, .tgid = key->tgid};
	struct key by_base = {.ssl = base, .tgid = key->tgid};

	known->next_sent = 0;
	rustls_connections_set(&id, known);
	rustls_connections_drop(key);
	rustls_updates_set(&by_decrypter, &id.ssl);
	rustls_updates_set(&by_base, &id.ssl);
}

/* The connection of a record; a new entry for one that is not known. 0: it is not in scope. */
INLINE struct rustls *rustls_of(struct settings *s, struct key *key, struct rustls_layer *layer, u64 base, u64 sent, u64 cookie)
{
	struct rustls *known = rustls_connections_get(key);

	if (known && rustls_follows(known, layer, sent))
		return known;
	if (known)
		rustls_end(key, known, sent, cookie);
	known = rustls_updated(key, layer, base);
	if (known && rustls_follows(known, layer, sent))
		return known;
	if (known)
		rustls_end(key, known, sent, cookie);
	if (!in_scope(s, key->tgid))
		return 0;
	u32 zero = 0;
	struct rustls *blank = blank_rustls_get(&zero);
	if (!blank || rustls_connections_set(key, blank)) {
		count(STAT_CONNECTION_TABLE_FULL, 1);
		return 0;
	}
	known = rustls_connections_get(key);
	if (!known)
		return 0;
	known->id = (bpf_ktime_get_ns() << 20 ^ key->ssl) | RUSTLS_ID;
	known->next_sent = sent;
	if (sent)
		known->state = RUSTLS_JOINED;
	return known;
}

/* --- which host --- */

/* Reads the name that stands there; 0: none does. */
INLINE int rustls_name_at(struct name *n, u64 base, u32 offset)
{
	u64 state[2], table[3], name[2]; /* a vtable: drop, size, alignment */
	u64 at = offset & 0xffff;

	n->length = 0;
	if (bpf_probe_read_user(state, sizeof(state), (void *)(base + (offset >> 16))) || !state[0] ||
	    (state[0] & 7) || bpf_probe_read_user(table, sizeof(table), (void *)state[1]) ||
	    table[2] != 8 || table[1] < at + sizeof(name) ||
	    bpf_probe_read_user(name, sizeof(name), (void *)(state[0] + at)))
		return 0;
	u64 length = name[1];
	if (length < RUSTLS_NAME_BYTES_MIN || length >= HOST_BYTES_MAX - 1)
		return 0;
	__builtin_memset(n->text, 0, sizeof(n->text));
	asm volatile("" : "+r"(length));
	length &= HOST_BYTES_MAX - 1;
	if (bpf_probe_read_user(n->text, length, (void *)name[0]))
		return 0;
	n->length = length;
	return 1;
}

/* Whether it can be a host's name: letters, digits, "-", "." and "_". */
INLINE void check_name(struct name *n)
{
	for (u32 i = 0; i < HOST_BYTES_MAX; i++) {
		u32 c = (u8)n->text[i], letter = (c | 32) - 'a';
		if (i >= REREAD(n->length))
			break;
		if (letter > 25 && c - '-' > '9' - '-' && c != '_') {
			n->length = 0;
			break;
		}
	}
}

/* The name that rustls keeps, once its location is known: of no length where there is none. */
INLINE void rustls_name(struct name *n, u64 base, struct name_location *p)
{
	n->length = 0;
	if (p && p->state == NAME_KNOWN && rustls_name_at(n, base, p->offset))
		check_name(n);
}

INLINE int same_rustls_name(struct name *n, u64 base, u32 offset, u64 *host)
{
	u64 differs = 0;

	if (!offset || !rustls_name_at(n, base, offset))
		return 0;
	drop_last_dot(n);
	for (u32 i = 0; i < HOST_BYTES_MAX / 8; i++) {
		differs |= FOLDED(((u64 *)n->text)[i], host[i]);
		asm volatile("" : "+r"(differs)); /* sixteen at once would not fit on the stack */
	}
	return !differs;
}

struct rustls_scan {
	struct name name;
	u32 states;
	u32 found;
	u32 state[RUSTLS_STATES_MAX];
};

/* Where in a block of the connection a pointer to an object with a vtable stands: the state may be that.
 * 0: no more are looked for. */
APART int find_states_in(struct rustls_scan *scan, u64 base, u32 block)
{
	if (!scan)
		return 0;
	for (u32 i = 0; i < RUSTLS_BLOCK_BYTES; i += 8) {
		u64 object[2], table[3];
		u32 at = block + i, next = REREAD(scan->states);
		if (next >= RUSTLS_STATES_MAX ||
		    bpf_probe_read_user(object, sizeof(object), (void *)(base + at)))
			return 0;
		if ((object[0] & 7) || (object[1] & 7) || object[0] >> 16 == 0 || object[1] >> 16 == 0 ||
		    bpf_probe_read_user(table, sizeof(table), (void *)object[1]))
			continue;
		if (table[2] != 8 || table[1] < 32 || table[1] > 8192)
			continue;
		scan->state[next & (RUSTLS_STATES_MAX - 1)] = at;
		scan->states = next + 1;
	}
	return 1;
}

INLINE void find_states(struct rustls_scan *scan, u64 base)
{
	scan->states = 0;
	for (u32 block = 0; block < RUSTLS_SCAN_BYTES; block += RUSTLS_BLOCK_BYTES)
		if (!find_states_in(scan, base, block))
			break;
}

/* Where in an object address and length of a text stand that begins like the name; -1: nowhere. */
APART int find_text(u64 object, u64 beginning)
{
	for (u32 at = 0; at < RUSTLS_STATE_BYTES; at += 8) {
		u64 name[2], text;
		if (bpf_probe_read_user(name, sizeof(name), (void *)(object + at)))
			break;
		if (name[1] < 8 || name[1] >= HOST_BYTES_MAX || name[0] >> 16 == 0)
			continue;
		bpf_probe_read_user(&text, sizeof(text), (void *)name[0]);
		if (!FOLDED(text, beginning))
			return at;
	}
	return -1;
}

/* Where that is in one of them. */
INLINE void find_rustls_name(struct rustls_scan *scan, u64 base, u64 beginning)
{
	find_states(scan, base);
	scan->found = 0;
	for (u32 i = 0; i < RUSTLS_STATES_MAX; i++) {
		if (i >= REREAD(scan->states))
			break;
		u32 state = scan->state[i];
		u64 object = 0;
		if (bpf_probe_read_user(&object, sizeof(object), (void *)(base + state)))
			break;
		int at = find_text(object, beginning);
		if (at >= 0) {
			scan->found = state << 16 | at;
			break;
		}
	}
}

/* Does the connection keep the name that it is known to have, and where? One is enough: address, length
 * and text in an object behind a vtable are no chance. Where it is known, each new connection shows that
 * it is still true; several in a row that do not, and it is no longer believed. */
APART int learn_rustls_name(u64 base, struct host_name *name, u64 voter, u64 cookie)
{
	if (!name)
		return 0;
	char *host = name->text;
	u32 number = cookie & COOKIE_FILE;
	struct name_location *p = name_locations_get(&number);
	if (!p || p->state == NAME_GIVEN_UP || p->voter == voter || !host[7])
		return 0;
	p->voter = voter;
	struct rustls_scan *scan = process_ring_reserve(sizeof(*scan));
	if (!scan) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	scan->found = p->offset;
	if (p->state == NAME_SOUGHT)
		find_rustls_name(scan, base, *(u64 *)host);
	u32 offset = REREAD(scan->found);
	int same = same_rustls_name(&scan->name, base, offset, (u64 *)host);
	process_ring_discard(scan);
	p->scans += 1;
	if (same) {
		p->scans = 0;
		p->offset = offset;
		if (p->state != NAME_KNOWN) {
			p->state = NAME_KNOWN;
			tell_location(cookie, offset);
		}
	} else if (p->state == NAME_ASSUMED) {
		p->state = NAME_SOUGHT;
	} else if (p->scans >= RUSTLS_SCANS_MAX) {
		if (p->state == NAME_KNOWN)
			tell_location(cookie, 0);
		p->state = NAME_GIVEN_UP;
	}
	return 0;
}

/* HTTP/2 of a name that is not known, on a socket that leads to a provider. */
INLINE void tell_rustls_unnamed(u64 id, struct tcp_socket *t)
{
	if (t->flags & SOCKET_UNNAMED)
		return;
	t->flags |= SOCKET_UNNAMED;
	count(STAT_HTTP2_WITHOUT_NAME, 1);
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->size = sizeof(*r);
	r->kind = KIND_UNNAMED;
	r->tgid = t->tgid;
	r->ssl = id;
	process_ring_submit(r);
}

/* A thread has written to the socket of a provider's connection: by its name, which the ClientHello told,
 * what it has encrypted before may be recognised. */
INLINE void learn_by_socket(u64 ids, struct tcp_socket *t)
{
	struct rustls_sender *sender = rustls_senders_get(&ids);
	if (!sender)
		return;
	u64 base = sender->base, cookie = sender->cookie, unnamed = sender->unnamed;
	rustls_senders_drop(&ids);
	if (!IS_BCC && t->state == SOCKET_NEW && !t->host[0])
		return; /* where it leads to is not known */
	if (unnamed)
		tell_rustls_unnamed(unnamed, t);
	if (t->host[0] && !(t->flags & (SOCKET_NO_NAME | SOCKET_ECH | SOCKET_BY_ADDRESS | SOCKET_TLS12)))
		learn_rustls_name(base, (struct host_name *)t->host, t->opened_ns, cookie);
}

INLINE void learn_by_request(struct key *key, struct rustls *known, u64 base, u64 cookie)
{
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct connection *c = connections_get(&id);
	known->by_request = 0;
	if (c && !known->tls12)
		learn_rustls_name(base, (struct host_name *)c->host, c->opened_ns, cookie);
}

/* What was received before the first request: no more than a server's settings. */
INLINE void rustls_early(struct key *id, struct connection *c, u64 bytes)
{
	struct chunk chunk = {
		.key = id,
		.connection = c,
		.offset = &c->received,
		.now = bpf_ktime_get_ns(),
		.direction = RECEIVED,
	};
	lost(c, STAT_COPY_FAILED_BYTES, bytes);
	emit_hole(&chunk, bytes);
}

/* The connection, by a name that is told: 0 unless it is wanted. */
INLINE struct connection *rustls_named(struct key *id, struct rustls *known, struct name *n)
{
	if (wanted_host(n))
		return admit(id, n, known->state & RUSTLS_MISSED_BEGINNING);
	known->state = RUSTLS_DENIED;
	count(STAT_DENIED, 1);
	return 0;
}

/* By the name that rustls keeps. */
INLINE struct connection *rustls_judge_name(struct key *id, struct rustls *known, u64 base, struct name_location *p)
{
	struct connection *c = 0;
	struct name *n = process_ring_reserve(sizeof(*n));

	if (!n) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	rustls_name(n, base, p);
	if (REREAD(n->length))
		c = rustls_named(id, known, n);
	process_ring_discard(n);
	return c;
}

/* By what is sent, where rustls keeps no name, or it is not known where. */
INLINE struct connection *rustls_judge_request(struct key *id, struct rustls *known, struct piece *piece)
{
	struct connection *c = 0;
	char first[16] __attribute__((aligned(8)));

	/* Zeros where they cannot be read. What follows a shorter piece does no harm. */
	bpf_probe_read_user(first, sizeof(first), (void *)piece->address);
	if (starts_a_request(first)) {
		struct head *h = process_ring_reserve(sizeof(*h));
		if (!h) {
			count(STAT_PROCESS_RING_FULL, 1);
			return 0;
		}
		if (read_host(h, piece->address, REREAD_64(piece->length)))
			c = rustls_named(id, known, &h->name);
		process_ring_discard(h);
	} else if (*(u64 *)first == HTTP2_PREFACE ||
		   begins_http2_request(piece->address, REREAD_64(piece->length))) {
		known->state = RUSTLS_UNNAMED;
	}
	if (c)
		known->by_request = 1;
	else if (known->state == RUSTLS_NEW)
		known->state = RUSTLS_JOINED;
	return c;
}

/* The first data that is sent on a connection, or as long as nothing told its host. */
INLINE struct connection *rustls_judge(struct key *id, struct rustls *known, struct rustls_layer *layer, u64 base, struct piece *piece, u64 cookie)
{
	u32 number = cookie & COOKIE_FILE, early = known->state == RUSTLS_NEW ? known->early : 0;
	struct name_location *p = name_locations_get(&number);
	struct connection *c = 0;

	if (p && p->state == NAME_KNOWN)
		c = rustls_judge_name(id, known, base, p);
	if (!c && known->state != RUSTLS_DENIED)
		c = rustls_judge_request(id, known, piece);
	if (!c)
		return 0;
	known->state = RUSTLS_ADMITTED;
	known->decrypter = layer->decrypter;
	known->next_received = layer->received;
	if (early)
		rustls_early(id, c, early);
	return c;
}

/* --- records --- */

/* HTTP/2's first bytes are a constant of the program's, on a page that may not be there yet, of which
 * reads fail; and always the same. */
INLINE void emit_http2_preface(struct chunk *c)
{
	struct {
		struct record head;
		u64 data[HTTP2_PREFACE_BYTES / 8];
	} *r = ring_reserve(sizeof(*r));

	if (r) {
		fill(&r->head, KIND_CHUNK, c->key, c->connection, c->now);
		r->head.size = sizeof(*r);
		r->head.length = r->head.captured = HTTP2_PREFACE_BYTES;
		r->data[0] = HTTP2_PREFACE;
		r->data[1] = 0x0a0d302e322f5054ULL; /* "TP/2.0\r\n" */
		r->data[2] = 0x0a0d0a0d4d530a0dULL; /* "\r\nSM\r\n\r\n" */
		count(STAT_CHUNKS, 1);
		ring_submit(r);
	} else {
		count(STAT_RING_FULL_RECORDS, 1);
		lost(c->connection, STAT_RING_FULL_BYTES, HTTP2_PREFACE_BYTES);
	}
	*c->offset += HTTP2_PREFACE_BYTES;
}

/* Steps over the pieces that other records had, to the one in which this record begins. */
INLINE void find_first_piece(struct rustls_message *m)
{
	u64 from = m->from, passed = 0, counted = 0;

	for (u32 i = 0; i < RUSTLS_PIECES_MAX; i++) {
		struct piece piece;
		if (i >= m->count || bpf_probe_read_user(&piece, sizeof(piece), (void *)(m->pieces + 16 * i)))
			break;
		if (from < piece.length)
			break;
		from -= piece.length;
		passed = i + 1;
	}
	/* Read back, the verifier forgets which turn ended the loop. */
	bpf_probe_read_kernel(&counted, sizeof(counted), &passed);
	m->from = from;
	m->pieces += 16 * counted;
	m->count = counted < m->count ? m->count - counted : 0;
}

/* Copies what is left of the first piece, as far as it belongs to the record. How much is missing then. */
INLINE u64 copy_piece(struct chunk *c, struct rustls_message *m, u64 left)
{
	struct piece piece;
	u64 length, wanted;

	if (!m->count || bpf_probe_read_user(&piece, sizeof(piece), (void *)m->pieces))
		return left;
	wanted = piece.length > m->from ? piece.length - m->from : 0;
	if (wanted > left)
		wanted = left;
	c->address = piece.address + m->from;
	m->pieces += 16;
	m->count -= 1;
	m->from = 0;
	/* By way of memory: of a number in a register the verifier would follow every class of sizes. */
	bpf_probe_read_kernel(&length, sizeof(length), &wanted);
	if (length)
		emit_tail(c, length);
	return left - length;
}

/* The pieces that are left, in one. What follows a piece that cannot be read is a hole. The verifier
 * wants room for two pieces of the largest size. */
#define GATHER(room) \
	do { \
		struct { \
			struct record head; \
			char data[2 * room]; \
		} *r = ring_reserve(sizeof(*r)); \
		if (!r) { \
			count(STAT_RING_FULL_RECORDS, 1); \
			lost(c->connection, STAT_RING_FULL_BYTES, total); \
			break; \
		} \
		fill(&r->head, KIND_CHUNK, c->key, c->connection, c->now); \
		r->head.direction = SENT; \
		r->head.offset = *c->offset; \
		r->head.length = total; \
		u64 at = 0; \
		for (u32 i = 0; i < RUSTLS_PIECES_MAX; i++) { \
			struct piece piece; \
			if (at >= total || at >= room || i >= m->count || \
			    bpf_probe_read_user(&piece, sizeof(piece), (void *)(m->pieces + 16 * i))) \
				break; \
			u64 wanted = piece.length; \
			if (wanted > total - at) \
				wanted = total - at; \
			asm volatile("" : "+r"(wanted)); /* as in EMIT */ \
			if (wanted > room || bpf_probe_read_user(r->data + at, wanted, (void *)piece.address)) \
				break; \
			at += wanted; \
		} \
		if (at > total) \
			at = total; \
		if (at < total) \
			lost(c->connection, STAT_COPY_FAILED_BYTES, total - at); \
		r->head.captured = at; \
		r->head.size = sizeof(r->head) + at; \
		count(STAT_CHUNKS, 1); \
		ring_submit(r); \
	} while (0)

/* A record is a part of what the program has given in several pieces. It seldom has more than two. */
INLINE void copy_pieces(struct chunk *c, struct rustls_message *m, u64 total)
{
	find_first_piece(m);
	total = copy_piece(c, m, total);
	if (!total)
		return;
	total = copy_piece(c, m, total);
	if (!total)
		return;
	if (total <= 1024)
		GATHER(1024);
	else
		GATHER(PIECE_BYTES_MAX);
	*c->offset += total;
}

/* One record that is sent, whole or, past a request's limit, not at all. */
APART int copy_message(u64 ssl, u32 tgid, struct rustls_message *m, u64 address, u64 length)
{
	u64 filled_before = ring_query(0 /* filled */);
	struct key key = {.ssl = ssl};
	struct chunk chunk = {.key = &key}, *c = &chunk;
	char byte;

	if (!m || !find_chunk(c, OWNER(tgid, SENT), address, bpf_ktime_get_ns()))
		return 0;
	u64 total = m->to - m->from;
	if (!total || total > PIECE_BYTES_MAX)
		return 0;
	if (begin_copy(c, total)) {
		count(STAT_REQUEST_CUT_BYTES, total);
		emit_hole(c, total);
		return 0;
	}
	if (!*c->offset && length == HTTP2_PREFACE_BYTES && bpf_probe_read_user(&byte, 1, (void *)address)) {
		emit_http2_preface(c);
		m->from += HTTP2_PREFACE_BYTES;
		total -= HTTP2_PREFACE_BYTES;
	}
	if (total)
		copy_pieces(c, m, total);
	nudge(filled_before);
	return 0;
}

INLINE void rustls_sent_data(struct key *key, struct rustls *known, struct rustls_layer *layer, u64 base, struct rustls_message *m, u64 cookie)
{
	struct piece piece;
	u64 total = m->to - m->from;
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct connection *c = 0;

	if (!total || total > PIECE_BYTES_MAX ||
	    bpf_probe_read_user(&piece, sizeof(piece), (void *)m->pieces))
		return;
	if (m->from)
		piece.length = 0; /* no beginning of anything */
	if (known->state == RUSTLS_ADMITTED) {
		c = connections_get(&id);
		if (!c)
			known->state = RUSTLS_DENIED; /* its socket has ended */
	} else {
		c = rustls_judge(&id, known, layer, base, &piece, cookie);
	}
	if (!c)
		return;
	struct chunk chunk = {
		.key = &id,
		.connection = c,
		.offset = &c->sent,
		.address = piece.address,
		.now = bpf_ktime_get_ns(),
		.direction = SENT,
	};
	if (!proved(&chunk, total, cookie)) {
		known->state = RUSTLS_DENIED;
		return;
	}
	if (!c->linked) {
		u64 ids = 0;
		u32 zero = 0;
		struct settings *s = settings_get(&zero);
		if (s) {
			ids = current_ids(s);
			writing_set(&ids, &id.ssl);
		}
	}
	copy_message(id.ssl, id.tgid, m, piece.address, piece.length);
}

/* Of an alert nothing is read: whatever it says, the client is about to end. */
INLINE void rustls_sent_alert(struct key *key, struct rustls *known)
{
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct connection *c = known->state == RUSTLS_ADMITTED ? connections_get(&id) : 0;
	if (!c)
		return;
	if (!c->linked) { /* nothing else will tell of its end */
		close_connection(&id, c);
		rustls_connections_drop(key);
		return;
	}
	struct record *record = ring_reserve(sizeof(*record));
	if (!record)
		return;
	fill(record, KIND_SHUTDOWN, &id, c, bpf_ktime_get_ns());
	ring_submit(record);
}

/* It is counted as sent by now, and is not: nobody is told before the process goes on. `pieces` and
 * `from` are those of the message as it came: to copy it moves its own on. */
INLINE void rustls_may_pause(struct key *key, struct rustls *known, u64 pieces, u64 from)
{
	struct key id = {.ssl = known->id, .tgid = key->tgid};
	struct piece piece;
	struct connection *c = known->state == RUSTLS_ADMITTED ? connections_get(&id) : 0;

	if (!c || bpf_probe_read_user(&piece, sizeof(piece), (void *)pieces) || from > piece.length)
		return;
	pause_before_request(&id, c, piece.address + from, piece.length - from);
}

SECTION("uprobe/enter_rustls_send") int enter_rustls_send(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s), cookie = OWN_PART(bpf_get_attach_cookie(r));
	u64 base = rustls_base(r, cookie);
	struct rustls_layer layer;
	if (bpf_probe_read_user(&layer, sizeof(layer), (void *)(base + RUSTLS_ENCRYPTER)))
		return 0;
	u64 sent = layer.sent - (cookie >> RUSTLS_COUNTED & 1);
	struct key key = {.ssl = layer.encrypter, .tgid = ids >> 32};
	struct rustls *known = rustls_of(s, &key, &layer, base, sent, cookie);
	if (!known)
		return 0;
	known->next_sent = sent + 1;
	if (known->state == RUSTLS_DENIED)
		return 0;
	struct rustls_message m;
	u64 message = rustls_object(r, cookie);
	if (bpf_probe_read_user(&m, sizeof(m), (void *)message))
		return 0;
	if (!m.pieces) { /* by way of memory: the verifier would follow both forms through all that comes */
		u64 alike[4] = {message + 8, 1, 0, m.from};
		bpf_probe_read_kernel(&m, sizeof(alike), alike);
	}
	if (m.content == RUSTLS_ALERT) {
		rustls_sent_alert(&key, known);
		return 0;
	}
	u32 number = cookie & COOKIE_FILE;
	u64 pieces = m.pieces, from = m.from;
	struct name_location *p = name_locations_get(&number);
	if (m.content == RUSTLS_DATA)
		rustls_sent_data(&key, known, &layer, base, &m, cookie);
	int of_use = p && p->state != NAME_GIVEN_UP && (p->state != NAME_KNOWN || m.content == RUSTLS_HANDSHAKE);
	if (of_use || known->state == RUSTLS_UNNAMED) {
		struct rustls_sender sender = {.base = base, .cookie = cookie};
		if (known->state == RUSTLS_UNNAMED)
			sender.unnamed = known->id;
		rustls_senders_set(&ids, &sender);
	}
	if (m.content == RUSTLS_DATA) {
		rustls_may_pause(&key, known, pieces, from);
		if (known->by_request)
			learn_by_request(&key, known, base, cookie);
	} else if (m.content == RUSTLS_HANDSHAKE) {
		u8 type = 0;
		known->tls12 = 1; /* if data follows with the same key */
		struct piece piece;
		if (known->state == RUSTLS_ADMITTED && m.count == 1 &&
		    !bpf_probe_read_user(&piece, sizeof(piece), (void *)m.pieces) &&
		    !bpf_probe_read_user(&type, 1, (void *)piece.address) && type == RUSTLS_KEY_UPDATE)
			rustls_await_update(&key, known, base);
	}
	return 0;
}

SECTION("uprobe/enter_rustls_receive") int enter_rustls_receive(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s), cookie = OWN_PART(bpf_get_attach_cookie(r));
	u64 base = rustls_base(r, cookie);
	struct rustls_layer layer;
	struct rustls_call *call = rustls_calls_get(&ids);
	if (call)
		call->encrypter = 0;
	if (bpf_probe_read_user(&layer, sizeof(layer), (void *)(base + RUSTLS_ENCRYPTER)))
		return 0;
	struct key key = {.ssl = layer.encrypter, .tgid = ids >> 32};
	struct rustls *known = rustls_of(s, &key, &layer, base, layer.sent, cookie);
	if (!known || (known->state != RUSTLS_ADMITTED && known->state != RUSTLS_NEW))
		return 0;
	struct rustls_call begun = {.encrypter = layer.encrypter, .id = known->id};
	if (call)
		*call = begun;
	else if (rustls_calls_set(&ids, &begun))
		count(STAT_THREAD_TABLE_FULL, 1);
	return 0;
}

SECTION("uprobe/leave_rustls_receive") int leave_rustls_receive(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s), cookie = OWN_PART(bpf_get_attach_cookie(r));
	struct rustls_call *call = rustls_calls_get(&ids);
	if (!call || !call->encrypter)
		return 0;
	struct key key = {.ssl = call->encrypter, .tgid = ids >> 32};
	u64 called = call->id;
	call->encrypter = 0;
	struct rustls *known = rustls_connections_get(&key);
	struct rustls_result result;
	if (!known || known->id != called ||
	    bpf_probe_read_user(&result, sizeof(result), (void *)rustls_object(r, cookie)) ||
	    result.tag != (cookie >> RUSTLS_REST & 0xff) || result.length > PIECE_BYTES_MAX)
		return 0;
	known->next_received += 1;
	if (known->state == RUSTLS_NEW) {
		if (result.content == RUSTLS_DATA)
			known->early += result.length;
		return 0;
	}
	struct key id = {.ssl = known->id, .tgid = key.tgid};
	struct connection *c = connections_get(&id);
	if (!c) {
		known->state = RUSTLS_DENIED; /* its socket has ended */
	} else if (result.content == RUSTLS_ALERT) {
		close_connection(&id, c);
		rustls_connections_drop(&key);
	} else if (result.content == RUSTLS_HANDSHAKE) {
		u8 type = 0;
		bpf_probe_read_user(&type, 1, (void *)result.address);
		known->received_update = type == RUSTLS_KEY_UPDATE;
	} else if (result.content == RUSTLS_DATA && result.length) {
		struct chunk chunk = {
			.key = &id,
			.connection = c,
			.offset = &c->received,
			.address = result.address,
			.now = bpf_ktime_get_ns(),
			.direction = RECEIVED,
		};
		u64 filled_before = ring_query(0 /* filled */);
		if (!proved(&chunk, result.length, cookie)) {
			known->state = RUSTLS_DENIED;
			return 0;
		}
		begin_copy(&chunk, result.length);
		emit_tail(&chunk, result.length);
		nudge(filled_before);
	}
	return 0;
}

/* ---- names and ends -------------------------------------------------------------------------- */

SECTION("uprobe/enter_ctrl") int enter_ctrl(struct registers *r)
{
	return (u32)ARG2(r) == 55 /* SSL_CTRL_SET_TLSEXT_HOSTNAME */ ? host_named(ARG1(r), ARG4(r), HOST_BYTES_MAX) : 0;
}

SECTION("uprobe/enter_set_host") int enter_set_host(struct registers *r)
{
	return host_named(ARG1(r), ARG2(r), HOST_BYTES_MAX);
}

/* gnutls_server_name_set, wolfSSL_UseSNI: object, kind of name, name, its length. */
SECTION("uprobe/enter_set_sized_host") int enter_set_sized_host(struct registers *r)
{
	return host_named(ARG1(r), ARG3(r), ARG4(r));
}

SECTION("uprobe/enter_free") int enter_free(struct registers *r) { return forget(ARG1(r)); }

/* SSL_clear: reuse for another connection, to the same host unless it is named again. OpenSSL
 * calls it itself when a handshake starts: nothing has been said then. */
SECTION("uprobe/enter_clear") int enter_clear(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	struct key key = {.ssl = ARG1(r), .tgid = current_ids(s) >> 32};
	struct connection *c = connections_get(&key);
	if (!c || (!c->sent && !c->received))
		return 0;
	begin_again(&key, c);
	return 0;
}

/* SSL_shutdown: the client will send no more, but may still read. */
SECTION("uprobe/enter_shutdown") int enter_shutdown(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	struct key key = {.ssl = ARG1(r), .tgid = current_ids(s) >> 32};
	struct connection *c = connections_get(&key);
	if (!c)
		return 0;
	struct record *record = ring_reserve(sizeof(*record));
	if (!record)
		return 0; /* SSL_free or the process's end will tell */
	fill(record, KIND_SHUTDOWN, &key, c, bpf_ktime_get_ns());
	ring_submit(record);
	return 0;
}

/* ---- processes ------------------------------------------------------------------------------- */

INLINE int forked(u32 child)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u32 tgid = current_ids(s) >> 32;
	u32 member = membership(tgid);
	/* Of everybody's: a process out of scope may come to be in it, and its number is used again. */
	struct birth birth = {.parent = tgid, .program = tgid, .at_ns = bpf_ktime_get_ns()};
	struct birth *own = current_birth();
	birth.left_ns = birth.at_ns;
	if (own) {
		birth.parent_ns = own->at_ns;
		if (own->program) {
			birth.program = own->program;
			birth.left_ns = own->left_ns;
		}
	}
	births_set(&child, &birth);
	if (member) {
		child |= TREE_FORKED;
		tree_set(&child, &member);
	}
	return 0;
}

/* The tracepoint's layout changed in 6.13 or so; user space reads its format and picks one. For a
 * new thread `child` is its thread id: harmless, and dropped when the thread exits. */
struct fork_arguments_arrays {
	u64 common;
	char parent_comm[16];
	u32 parent;
	char child_comm[16];
	u32 child;
};
struct fork_arguments_locations {
	u64 common;
	u32 parent_comm;
	u32 parent;
	u32 child_comm;
	u32 child;
};
SECTION("tracepoint/fork_arrays") int fork_arrays(struct fork_arguments_arrays *a) { return forked(a->child); }
SECTION("tracepoint/fork_locations") int fork_locations(struct fork_arguments_locations *a) { return forked(a->child); }

struct exec_arguments {
	u64 common;
	u32 filename; /* its distance from here, and in the high half its length */
	u32 pid;
	u32 old_pid; /* of the thread that has called exec: it takes the number of the first */
};
/* Its connections went with its memory. */
INLINE void end_connections(u32 tgid)
{
	if (!owners_get(&tgid))
		return;
	struct record *gone = ring_reserve(sizeof(*gone));
	if (gone) {
		__builtin_memset(gone, 0, sizeof(*gone));
		gone->size = sizeof(*gone);
		gone->kind = KIND_EXIT;
		gone->tgid = tgid;
		gone->at_ns = bpf_ktime_get_ns();
		ring_submit(gone);
	} else {
		count(STAT_NOTICES_LOST, 1);
	}
	owners_drop(&tgid);
}

/* At this moment a new program's stack holds, from its pointer on: the number of arguments, their
 * addresses, 0, the addresses of the environment's variables, 0; the texts lie behind each other. */
INLINE void copy_arguments(struct exec_record *r, u64 sp)
{
	u64 head[2] = {}, end = 0; /* number, first address; the first variable's address */

	if (bpf_probe_read_user(head, sizeof(head), (void *)sp) || !head[0] || head[0] > 1 << 20)
		return;
	bpf_probe_read_user(&end, sizeof(end), (void *)(sp + 8 * (head[0] + 2)));
	u64 last = 0;
	if (!end) { /* no environment: only the last text's own end tells where it is */
		bpf_probe_read_user(&last, sizeof(last), (void *)(sp + 8 * head[0]));
		if (last < head[1])
			return;
		end = last;
	}
	if (end < head[1])
		return;
	u64 length = end - head[1];
	r->head.length = length > 0x7fffffff ? 0x7fffffff : length;
	u64 copied = length > ARGUMENT_BYTES_MAX ? ARGUMENT_BYTES_MAX : length;
	asm volatile("" : "+r"(copied));
	if (copied > ARGUMENT_BYTES_MAX)
		return;
	if (bpf_probe_read_user(r->arguments, copied, (void *)head[1]))
		return;
	r->head.captured = copied;
	if (last && length == copied) {
		long more = bpf_probe_read_user_str(r->arguments + copied, LAST_ARGUMENT_BYTES_MAX, (void *)last);
		if (more > 0) { /* the NUL of one that was cut is not its own */
			r->head.captured += more - (more == LAST_ARGUMENT_BYTES_MAX);
			r->head.length += more;
		}
	}
}

INLINE void find_project(struct exec_record *r, u64 sp)
{
	u64 number = 0;

	if (bpf_probe_read_user(&number, sizeof(number), (void *)sp) || number > 1 << 20)
		return;
	for (u64 i = 0; i < VARIABLES_MAX; i++) {
		u64 address = 0, start[2] = {};
		if (bpf_probe_read_user(&address, sizeof(address), (void *)(sp + 8 * (number + 2 + i))) ||
		    !address)
			return;
		if (!bpf_probe_read_user(start, sizeof(start), (void *)address) &&
		    start[0] == 0x505f4e4f544c4148ULL /* HALTON_P */ &&
		    (start[1] & 0xffffffffffffffULL) == 0x3d5443454a4f52ULL /* ROJECT= */) {
			bpf_probe_read_user_str(r->project, sizeof(r->project), (void *)address);
			return;
		}
	}
}

INLINE int executed(struct exec_arguments *a, u64 sp)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u32 tgid = current_ids(s) >> 32;
	u32 thread = a->old_pid | TREE_FORKED, first = (bpf_get_current_pid_tgid() >> 32) | TREE_FORKED;
	if (thread != first) { /* the first thread has ended before, and with it the process's entries */
		u32 *kept = tree_get(&thread);
		if (kept && !tree_get(&first)) {
			u32 member = *kept;
			tree_set(&first, &member);
		}
		tree_drop(&thread);
	}
	end_connections(tgid);
	struct birth *birth = current_birth();
	if (birth)
		birth->program = 0;
	if (!in_scope(s, tgid)) {
		if ((membership(tgid) & (TREE_IN_SCOPE | TREE_EXCLUDED)) == TREE_IN_SCOPE)
			count(STAT_RAN_AS_ANOTHER_USER, 1);
		return 0;
	}
	if (s->pid_namespace) { /* user space cannot look it up by the id of its fork */
		u32 member = membership(tgid);
		if (member)
			tree_set(&tgid, &member);
	}
	struct exec_record *r = exec_scratch_get(&zero);
	if (!r)
		return 0;
	__builtin_memset(r, 0, EXEC_BYTES_MIN);
	bpf_probe_read_kernel_str(r->path, sizeof(r->path), (char *)a + (a->filename & 0xffff));
	r->head.kind = KIND_EXEC;
	r->head.tgid = tgid;
	r->head.uid = bpf_get_current_uid_gid();
	r->head.at_ns = bpf_ktime_get_ns();
	r->head.offset = birth ? birth->parent : 0;
	bpf_get_current_comm(r->comm, sizeof(r->comm));
	if (sp) {
		copy_arguments(r, sp);
		find_project(r, sp);
	}
	u64 size = EXEC_BYTES_MIN + r->head.captured;
	asm volatile("" : "+r"(size));
	if (size > sizeof(*r))
		return 0;
	r->head.size = size;
	if (!process_ring_output(r, size))
		return 0;
	r->head.captured = 0; /* full: what is short may find room yet, /proc may tell the rest */
	r->head.size = EXEC_BYTES_MIN;
	if (process_ring_output(r, EXEC_BYTES_MIN))
		count(STAT_PROCESS_RING_FULL, 1);
	return 0;
}

SECTION("tracepoint/sched_process_exec") int on_exec(struct exec_arguments *a) { return executed(a, 0); }

/* The same, where the kernel knows its own types (BTF) and is 5.15 or later. */
SECTION("tracepoint/sched_process_exec") int on_exec_with_arguments(struct exec_arguments *a)
{
	struct registers *user = task_registers(current_task());
	u64 sp = 0;

	if (user)
		bpf_probe_read_kernel(&sp, sizeof(sp), &user->sp);
	return executed(a, sp);
}

/* _dl_debug_state, which the dynamic linker calls for debuggers when it has mapped libraries. */
SECTION("uprobe/on_mapped") int on_mapped(struct registers *unused)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u32 tgid = current_ids(s) >> 32;
	if (!in_scope(s, tgid))
		return 0;
	struct record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->size = sizeof(*r);
	r->kind = KIND_MAPPED;
	r->tgid = tgid;
	process_ring_submit(r);
	return 0;
}

/* getaddrinfo(name): that a process wants the address of a host on the list, and nothing of others.
 * It is all that is known of the hosts of a TLS stack without probes. */
struct lookup_record {
	struct record head;
	char host[HOST_BYTES_MAX];
};
SECTION("uprobe/on_lookup") int on_lookup(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s || !ARG1(r))
		return 0;
	u64 ids = current_ids(s);
	u32 tgid = ids >> 32;
	if (!in_scope(s, tgid))
		return 0;
	struct name *n = process_ring_reserve(sizeof(*n));
	if (!n) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	__builtin_memset(n->text, 0, sizeof(n->text));
	long length = bpf_probe_read_user_str(n->text, sizeof(n->text), (void *)ARG1(r));
	n->length = length > 0 ? length - 1 : 0;
	if (wanted_host(n)) {
		struct lookup_call call = {.result = ARG4(r)};
		bpf_probe_read_kernel(call.host, sizeof(call.host), n->text);
		lookups_set(&ids, &call);
		struct lookup_record *found = process_ring_reserve(sizeof(*found));
		if (found) {
			__builtin_memset(&found->head, 0, sizeof(found->head));
			found->head.size = sizeof(*found);
			found->head.kind = KIND_LOOKUP;
			found->head.tgid = tgid;
			__builtin_memcpy(found->host, n->text, sizeof(found->host));
			process_ring_submit(found);
		} else {
			count(STAT_PROCESS_RING_FULL, 1);
		}
	}
	process_ring_discard(n);
	return 0;
}

/* The addresses that it found. A list is read as the C library lays it out (struct addrinfo). */
struct address_info {
	u32 flags;
	u32 family;
	u64 unused[2];
	u64 address;
	u64 name;
	u64 next;
};
SECTION("uprobe/on_looked_up") int on_looked_up(struct registers *r)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s), at = 0;
	struct lookup_call *call = lookups_get(&ids);
	if (!call)
		return 0;
	if (!(int)RESULT(r) && !bpf_probe_read_user(&at, sizeof(at), (void *)call->result)) {
		for (int i = 0; i < ADDRESSES_A_LOOKUP_MAX; i++) {
			struct address_info info = {};
			struct address address = {};
			if (!at || bpf_probe_read_user(&info, sizeof(info), (void *)at))
				break;
			/* behind family and port; IPv6: behind the flow as well */
			if (info.family == AF_INET)
				bpf_probe_read_user(&address, 4, (void *)(info.address + 4));
			else if (info.family == AF_INET6)
				bpf_probe_read_user(&address, 16, (void *)(info.address + 8));
			addresses_set(&address, (struct host_name *)call->host);
			at = info.next;
		}
	}
	lookups_drop(&ids);
	return 0;
}

/* ---- sockets -----------------------------------------------------------------------------------
 *
 * A count of its own of the connections that processes in scope open to providers, whatever TLS code
 * they use: what the probes have metered is held against it (sockets.py). A connection is followed from
 * connect() on; the first bytes that it sends are read where the process has them, through the
 * registers of its system call. Of a ClientHello only the server's name is looked at, here: a
 * connection to another host is forgotten at once. Of what follows only the heads of TLS records
 * are looked at, until the first that can hold a request: a connection that was opened in advance and
 * never used is no miss. */

struct socket_record {
	struct record head;
	struct tcp_socket socket;
};

/* Into one that is zeros so far. */
INLINE void set_birth(struct tcp_socket *t)
{
	struct birth *birth = current_birth();
	if (!birth)
		return;
	t->born_ns = birth->at_ns;
	t->parent = birth->parent;
	t->program = birth->program;
	t->left_ns = birth->left_ns;
	t->parent_ns = birth->parent_ns;
}

INLINE void tell_socket(u32 kind, u64 sk, struct tcp_socket *t)
{
	struct socket_record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	__builtin_memset(&r->head, 0, sizeof(r->head));
	r->head.size = sizeof(*r);
	r->head.kind = kind;
	r->head.tgid = t->tgid;
	r->head.uid = t->uid;
	r->head.ssl = sk;
	r->head.opened_ns = t->opened_ns;
	r->head.at_ns = bpf_ktime_get_ns();
	r->head.offset = t->born_ns;
	r->head.length = t->run;
	__builtin_memcpy(&r->socket, t, sizeof(r->socket));
	process_ring_submit(r);
}

INLINE int same_host(u64 *one, u64 *other)
{
	u64 differs = 0;
#pragma unroll
	for (int i = 0; i < HOST_BYTES_MAX / 8; i++)
		differs |= one[i] ^ other[i];
	return !differs;
}

/* The connection that the goroutine of this system call writes on; 0: none, or no Go. The thread would
 * not tell it: another goroutine may have begun a Write here and gone on elsewhere. */
INLINE u64 go_writing(u32 tgid)
{
	struct registers *user = task_registers(current_task());
	struct go_key call_key = {.tgid = tgid, .direction = SENT};
	if (!user || bpf_probe_read_kernel(&call_key.goroutine, sizeof(call_key.goroutine), &GO_GOROUTINE(user)))
		return 0;
	struct go_call *call = go_calls_get(&call_key);
	return call ? call->connection : 0;
}

/* Is it the socket of the TLS connection that this thread, or goroutine, writes on? */
INLINE void link_socket(struct tcp_socket *t)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return;
	u64 ids = current_ids(s);
	u64 *by_thread = writing_get(&ids);
	learn_by_socket(ids, t);
	u64 ssl = go_writing(ids >> 32);
	if (!ssl && by_thread)
		ssl = *by_thread;
	if (!ssl)
		return;
	struct key key = {.ssl = ssl, .tgid = ids >> 32};
	struct connection *c = connections_get(&key);
	if (!c || c->linked)
		return;
	if ((t->flags & SOCKET_ECH) && (c->opened_ns < t->opened_ns || (t->used_ns && c->opened_ns > t->used_ns)))
		return; /* it may lead elsewhere, before or after another connection on this thread */
	if (!t->host[0])
		__builtin_memcpy(t->host, c->host, sizeof(t->host));
	else if (!same_host((u64 *)t->host, (u64 *)c->host))
		return;
	c->linked = 1;
	t->linked = key.ssl;
	if (t->used_ns && c->opened_ns > t->used_ns + LATE_NS)
		t->flags |= SOCKET_LATE;
}

#define ONE_OF_SEVERAL (~0ULL)

/* What a system call has sent: in one piece, or in several (`count` of them from `vector` on). */
struct payload {
	u64 base;
	u64 length; /* or ONE_OF_SEVERAL messages of a call: it is not known which */
	u64 vector;
	u64 count;
	u64 name; /* the address of the receiver's address, if given */
};

/* 0: it is not known where. It stays there until the call returns, and a process that changes it
 * meanwhile deceives us about nobody but itself. */
APART int find_payload(struct payload *p, u64 total)
{
	struct registers *user = task_registers(current_task());
	u64 call = 0, several = 0, header[4] = {};

	if (!p || !user || bpf_probe_read_kernel(&call, sizeof(call), SYSCALL(user)))
		return 0;
	bpf_probe_read_kernel(&p->base, sizeof(p->base), CALL_ARG2(user));
	p->length = total;
	if (call == CALL_WRITE)
		return 1;
	if (call == CALL_SENDTO) {
		bpf_probe_read_kernel(&p->name, sizeof(p->name), CALL_ARG5(user));
		return 1;
	}
	p->vector = p->base;
	if (call == CALL_WRITEV) {
		bpf_probe_read_kernel(&p->count, sizeof(p->count), CALL_ARG3(user));
	} else if (call == CALL_SENDMSG || call == CALL_SENDMMSG) {
		/* name, its length, the vector, how many */
		if (bpf_probe_read_user(header, sizeof(header), (void *)p->base))
			return 0;
		p->name = header[0];
		p->vector = header[2];
		p->count = header[3];
		if (!IS_BCC && call == CALL_SENDMMSG)
			bpf_probe_read_kernel(&several, sizeof(several), CALL_ARG3(user));
	} else {
		return 0;
	}
	u64 piece[2] = {};
	if (!p->count || bpf_probe_read_user(piece, sizeof(piece), (void *)p->vector))
		return 0;
	p->base = piece[0];
	p->length = piece[1] < total ? piece[1] : total;
	if (!IS_BCC && (u32)several > 1)
		p->length = ONE_OF_SEVERAL;
	return 1;
}

/* Scratch, as `struct head` is. */
struct hello {
	struct name name;
	u32 position;
	u32 end;
	u32 name_at;
	u32 encrypted;
};

#define BIG_ENDIAN_16(b) ((u32)(b)[0] << 8 | (b)[1])

/* Bytes of the ClientHello, which lies in memory of ours; 0 where it does not reach that far. */
INLINE int hello_at(struct hello *h, const u8 *hello, u32 at, u8 *bytes, u32 length)
{
	if (at + length > REREAD(h->end))
		return 0;
	return !bpf_probe_read_kernel(bytes, length, hello + at);
}

/* Finds the name and whether there is an encrypted ClientHello, from the extensions on (RFC 8446,
 * 4.1.2). */
INLINE void read_extensions(struct hello *h, const u8 *hello)
{
	u8 extension[4] = {};
	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		u32 at = REREAD(h->position);
		if (!hello_at(h, hello, at, extension, sizeof(extension)))
			break;
		u32 type = BIG_ENDIAN_16(extension);
		if (type == 0)
			h->name_at = at + sizeof(extension);
		if (type == 0xfe0d)
			h->encrypted = 1;
		h->position = at + sizeof(extension) + BIG_ENDIAN_16(extension + 2);
	}
}

INLINE void read_hello(struct hello *h, const u8 *hello, u32 length)
{
	u8 bytes[5] = {};
	u32 at = 43; /* behind record and handshake heads, version, random */

	__builtin_memset(&h->name.text, 0, sizeof(h->name.text));
	h->name.length = 0;
	h->name_at = 0;
	h->encrypted = 0;
	h->end = length;
	if (!hello_at(h, hello, at, bytes, 1)) /* session */
		return;
	at += 1 + bytes[0];
	if (!hello_at(h, hello, at, bytes, 2)) /* ciphers */
		return;
	at += 2 + BIG_ENDIAN_16(bytes);
	if (!hello_at(h, hello, at, bytes, 1)) /* compression */
		return;
	h->position = at + 1 + bytes[0] + 2;
	read_extensions(h, hello);
	at = REREAD(h->name_at);
	if (!at || !hello_at(h, hello, at, bytes, sizeof(bytes)) || bytes[2])
		return;
	u64 named = BIG_ENDIAN_16(bytes + 3);
	if (!named || named >= HOST_BYTES_MAX - 1 || at + 5 + named > REREAD(h->end))
		return;
	asm volatile("" : "+r"(named));
	named &= HOST_BYTES_MAX - 1;
	if (bpf_probe_read_kernel(h->name.text, named, hello + at + 5))
		return;
	h->name.length = named;
}

/* IPv4 on a socket for both is known by its IPv4 address. */
INLINE void unmap(struct address *a)
{
	u64 *half = (u64 *)a->bytes;
	if (!half[0] && (u32)half[1] == 0xffff0000) {
		half[0] = half[1] >> 32;
		half[1] = 0;
	}
}

INLINE struct host_name *host_of(struct address *a)
{
	struct address plain = *a;
	unmap(&plain);
	return addresses_get(&plain);
}

INLINE void host_by_address(struct tcp_socket *t)
{
	struct host_name *known = host_of((struct address *)t->address);
	if (!known || (t->flags & SOCKET_ASKED_PROXY))
		return;
	__builtin_memcpy(t->host, known->text, sizeof(t->host));
	t->flags |= SOCKET_BY_ADDRESS;
}

/* A connection's ClientHello: 1 where it leads to a provider, or may. */
INLINE int judge_hello(struct tcp_socket *t, const u8 *hello, u32 length)
{
	struct hello *h = process_ring_reserve(sizeof(*h));
	if (!h) {
		count(STAT_PROCESS_RING_FULL, 1);
		return 0;
	}
	read_hello(h, hello, length);
	if (length >= HELLO_RANDOM_AT + sizeof(t->hello))
		bpf_probe_read_kernel(&t->hello, sizeof(t->hello), hello + HELLO_RANDOM_AT);
	if (REREAD(h->name_at) == 0) {
		t->flags |= SOCKET_NO_NAME;
		host_by_address(t);
	} else if (wanted_host(&h->name)) {
		bpf_probe_read_kernel(t->host, sizeof(t->host), h->name.text);
		if (!(t->flags & SOCKET_ASKED_PROXY)) {
			struct address plain = *(struct address *)t->address;
			unmap(&plain);
			addresses_set(&plain, (struct host_name *)t->host);
		}
	} else if (h->encrypted) {
		t->flags |= SOCKET_ECH;
		host_by_address(t);
	}
	process_ring_discard(h);
	return t->host[0] || (t->flags & SOCKET_NO_NAME);
}

/* What a TLS record that the client sends says of the connection: 1 when it can hold a request. TLS 1.3
 * sends the end of its handshake as if it were data; before it a client sends no handshake record
 * but ClientHellos. */
INLINE int holds_request(struct tcp_socket *t, const u8 *head, u32 length)
{
	if (head[0] == 22 && !(head[5] == 1 && length > 100))
		t->flags |= SOCKET_TLS12;
	if (head[0] != 23)
		return 0;
	if (!(t->flags & (SOCKET_TLS12 | SOCKET_FINISHED))) {
		t->flags |= SOCKET_FINISHED;
		return 0;
	}
	return length > ALERT_BYTES_MAX;
}

#define RECORD_HEAD_BYTES 6 /* its kind, version and length, and the first byte of its content */

/* The head of a TLS record at `at`, which `left` bytes of this piece hold, the rest the next one. */
INLINE int record_head(struct payload *p, u64 at, u64 left, u64 next, u8 *head)
{
	u64 first = 0, rest = 0, piece[2] = {};
	u32 here = left < RECORD_HEAD_BYTES ? left : RECORD_HEAD_BYTES;

	if (!here || bpf_probe_read_user(&first, here, (void *)at))
		return 0;
	if (here < RECORD_HEAD_BYTES && next < p->count) {
		if (bpf_probe_read_user(piece, sizeof(piece), (void *)(p->vector + 16 * next)))
			return 0;
		u32 there = RECORD_HEAD_BYTES - here;
		if (piece[1] < there)
			there = piece[1];
		if (there && bpf_probe_read_user(&rest, there & 7, (void *)piece[0]))
			return 0;
		first |= rest << (8 * here);
		here += there;
	}
	*(u64 *)head = first;
	return here >= RECORD_HEAD_BYTES - 1; /* of a head that is sent alone no content is known */
}

/* Steps over the heads of the records in what was sent, up to the first that can hold a request. */
APART int follow_records(struct tcp_socket *t, struct payload *p)
{
	if (!t || !p)
		return 0;
	u64 piece[2] = {}, left = p->length, at = p->base, next = 1;
	u8 head[8] __attribute__((aligned(8))) = {};
	for (int i = 0; i < RECORDS_MAX; i++) {
		if (t->skip >= left) {
			t->skip -= left;
			if (next >= p->count)
				return 0;
			if (bpf_probe_read_user(piece, sizeof(piece), (void *)(p->vector + 16 * next)))
				break;
			at = piece[0];
			left = piece[1];
			next += 1;
			continue;
		}
		at += t->skip;
		left -= t->skip;
		t->skip = 0;
		u32 length;
		if (!record_head(p, at, left, next, head))
			break;
		length = BIG_ENDIAN_16(head + 3);
		if (head[0] < 20 || head[0] > 24 || head[1] != 3)
			break;
		if (holds_request(t, head, length)) {
			t->used_ns = bpf_ktime_get_ns();
			return 0;
		}
		t->skip = 5 + length;
	}
	t->flags &= ~SOCKET_FOLLOWED; /* user space judges by the number of bytes (sockets.py) */
	return 0;
}

/* Put what was sent behind what the connection has sent of its ClientHello. */
APART int gather_hello(struct hello_room *room, struct payload *p, u64 total)
{
	if (!room || !p)
		return 0;
	u64 at = p->base, left = p->length, next = 1, piece[2] = {};
	for (int i = 0; i < HELLO_PIECES_MAX; i++) {
		u32 have = REREAD(room->hello.length);
		if (have >= HELLO_BYTES_MAX)
			break;
		u64 more = left < total ? left : total;
		if (more >= HELLO_BYTES_MAX)
			more = HELLO_BYTES_MAX - 1;
		asm volatile("" : "+r"(more));
		more &= HELLO_BYTES_MAX - 1;
		if (more && bpf_probe_read_user(room->hello.bytes + (have & (HELLO_BYTES_MAX - 1)), more, (void *)at))
			break;
		have += more;
		room->hello.length = have < HELLO_BYTES_MAX ? have : HELLO_BYTES_MAX;
		total -= more;
		if (!total || next >= p->count ||
		    bpf_probe_read_user(piece, sizeof(piece), (void *)(p->vector + 16 * next)))
			break;
		at = piece[0];
		left = piece[1];
		next += 1;
	}
	return 0;
}

/* What bcc loads is all one program, and must stay short enough for the verifier: it leaves out what no
 * system call shows where nobody looked the address up, and MPTCP.
 *
 * A write on a connection of which it is not known yet where it leads: 1 once it is known that the
 * records behind its ClientHello are to be followed. */
INLINE int judge_socket(u64 sk, struct tcp_socket *t, struct payload *p, u64 total)
{
	u32 zero = 0, before = 0;
	struct hello_room *room = hello_scratch_get(&zero);
	if (!room)
		return 0;

	t->writes += 1;
	const u8 *head = room->hello.bytes;
	struct hello_bytes *begun = hellos_get(&sk);
	room->hello.length = 0;
	if (begun && !bpf_probe_read_kernel(&room->hello, sizeof(room->hello), begun)) {
		before = REREAD(room->hello.length);
		hellos_drop(&sk);
	}
	gather_hello(room, p, total);
	u32 have = REREAD(room->hello.length), whole = 5 + BIG_ENDIAN_16(head + 3);
	u32 may_be = have && head[0] == 22 && (have < 2 || head[1] == 3) && (have < 6 || head[5] == 1);
	if (may_be && (have < 5 || have < whole) && have < HELLO_BYTES_MAX && t->writes < HELLO_WRITES_MAX) {
		hellos_set(&sk, &room->hello);
		return 0;
	}
	if (may_be) {
		if (!judge_hello(t, head, have)) {
			sockets_drop(&sk);
			return 0;
		}
		t->state = SOCKET_SEEN;
		t->hello_sent = t->sent;
		t->flags |= SOCKET_FOLLOWED;
		t->skip = whole > before ? whole - before : 0;
		return 1;
	}
	if (have >= 4 && *(u32 *)head == 0x4e4e4f43 /* CONN */)
		t->flags |= SOCKET_ASKED_PROXY;
	if (t->writes >= HELLO_WRITES_MAX)
		sockets_drop(&sk);
	return 0;
}

/* The same of a write that cannot be read: 1 where somebody looked the address up. Else the TLS connection
 * that its thread writes on may tell the host (`link_socket`), if all writes were such, but not with the
 * first: that is no request, whatever it is. */
INLINE int judge_unread(u64 sk, struct tcp_socket *t)
{
	if (!t->writes)
		t->flags |= SOCKET_UNREAD;
	t->writes += 1;
	host_by_address(t);
	if (t->host[0]) {
		t->state = SOCKET_SEEN;
		return 1;
	}
	if (t->writes < HELLO_WRITES_MAX)
		return !IS_BCC && t->writes > 1 && (t->flags & SOCKET_UNREAD);
	sockets_drop(&sk);
	return 0;
}

struct state_arguments { /* of sock:inet_sock_set_state since Linux 5.6; user space compares */
	u64 common;
	u64 sk;
	u32 before;
	u32 now;
	u16 source_port;
	u16 port;
	u16 family;
	u16 protocol;
	u8 source[4];
	u8 address[4];
	u8 source6[16];
	u8 address6[16];
};

INLINE void socket_opened(struct state_arguments *a)
{
	u32 zero = 0;
	u64 sk = a->sk;
	struct settings *s = settings_get(&zero);
	struct tcp_socket *t = blank_socket_get(&zero);
	if (!s || !t)
		return;
	u64 ids = current_ids(s);
	if (!in_scope(s, ids >> 32))
		return;
	struct tcp_socket *before = sockets_get(&sk);
	if (before && before->state == SOCKET_SEEN) /* disconnected, to be connected again */
		tell_socket(KIND_SOCKET_ENDED, sk, before);
	if (sockets_set(&sk, t)) {
		count(STAT_SOCKET_TABLE_FULL, 1);
		return;
	}
	t = sockets_get(&sk);
	if (!t)
		return;
	t->opened_ns = bpf_ktime_get_ns();
	set_birth(t);
	t->tgid = ids >> 32;
	t->uid = bpf_get_current_uid_gid();
	t->run = membership(t->tgid) >> TREE_FLAG_BITS;
	t->port = a->port;
	t->family = a->family;
	if (a->family == AF_INET)
		__builtin_memcpy(t->address, a->address, sizeof(a->address));
	else
		__builtin_memcpy(t->address, a->address6, sizeof(a->address6));
	bpf_get_current_comm(t->comm, sizeof(t->comm));
}

/* MPTCP has a socket of TCP's below for each path, on which no process sends. */
INLINE int is_stream(u32 protocol) { return protocol == IPPROTO_TCP || (!IS_BCC && protocol == IPPROTO_MPTCP); }

INLINE void socket_ended(u64 sk)
{
	struct tcp_socket *t = sockets_get(&sk);
	if (!t)
		return;
	if (t->linked & RUSTLS_ID) { /* rustls frees a connection where nobody sees it */
		struct key key = {.ssl = t->linked, .tgid = t->tgid};
		struct connection *c = connections_get(&key);
		if (c)
			close_connection(&key, c);
	}
	if (t->state == SOCKET_SEEN)
		tell_socket(KIND_SOCKET_ENDED, sk, t);
	sockets_drop(&sk);
}

/* connect() does that in its own process. Of the end of MPTCP's socket nothing else tells. */
SECTION("tracepoint/inet_sock_set_state") int on_socket_state(struct state_arguments *a)
{
	if (a->now == TCP_SYN_SENT && is_stream(a->protocol))
		socket_opened(a);
	else if (!IS_BCC && a->now == TCP_CLOSE && a->protocol == IPPROTO_MPTCP)
		socket_ended(a->sk);
	return 0;
}

/* Its state says "closed" while its process may still read what has come. */
SECTION("raw_tracepoint/tcp_destroy_sock") int on_socket_destroyed(u64 *a)
{
	socket_ended(a[0]);
	return 0;
}

/* The far address of a socket that is connected: it is among its first fields. Returns its family. */
INLINE u16 connected_to(u64 sk, u8 *address)
{
	u16 family = 0;
	bpf_probe_read_kernel(&family, sizeof(family), (void *)(sk + 16));
	if (family == AF_INET)
		bpf_probe_read_kernel(address, 4, (void *)sk);
	else
		bpf_probe_read_kernel(address, 16, (void *)(sk + 56));
	return family;
}

/* A datagram that opens a QUIC connection to an address of a provider. */
INLINE void quic_opened(u64 sk, u64 total)
{
	u32 zero = 0, version = 0;
	u8 head = 0;
	u16 to[2] = {};
	struct payload p = {};
	struct address address = {};
	struct settings *s = settings_get(&zero);

	if (!s)
		return;
	u32 tgid = current_ids(s) >> 32;
	if (!in_scope(s, tgid) || !find_payload(&p, total) ||
	    bpf_probe_read_user(&head, sizeof(head), (void *)p.base) ||
	    bpf_probe_read_user(&version, sizeof(version), (void *)(p.base + 1)))
		return;
	if ((head & 0xc0) != 0xc0 || (version != 0x01000000 && version != 0xcf43336b))
		return;
	if (p.name) {
		bpf_probe_read_user(to, sizeof(to), (void *)p.name); /* family, port */
		if (to[0] == AF_INET)
			bpf_probe_read_user(&address, 4, (void *)(p.name + 4));
		else
			bpf_probe_read_user(&address, 16, (void *)(p.name + 8));
	} else {
		connected_to(sk, (u8 *)&address);
	}
	struct host_name *host = host_of(&address);
	if (!host)
		return;
	u8 one = 1;
	struct quic_key key = {.sk = sk, .tgid = tgid, .to = address};
	bpf_probe_read_kernel(&key.own_port, sizeof(key.own_port), (void *)(sk + 14)); /* skc_num */
	if (quic_sockets_get(&key))
		return;
	quic_sockets_set(&key, &one);
	struct socket_record *r = process_ring_reserve(sizeof(*r));
	if (!r) {
		count(STAT_PROCESS_RING_FULL, 1);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->head.size = sizeof(*r);
	r->head.kind = KIND_QUIC;
	r->head.tgid = tgid;
	r->head.uid = bpf_get_current_uid_gid();
	r->head.ssl = sk;
	r->head.at_ns = bpf_ktime_get_ns();
	r->head.opened_ns = r->head.at_ns;
	r->socket.opened_ns = r->head.at_ns;
	set_birth(&r->socket);
	r->socket.tgid = tgid;
	r->socket.uid = r->head.uid;
	r->socket.run = membership(tgid) >> TREE_FLAG_BITS;
	bpf_get_current_comm(r->socket.comm, sizeof(r->socket.comm));
	__builtin_memcpy(r->socket.host, host->text, sizeof(r->socket.host));
	process_ring_submit(r);
}

/* MPTCP's socket is told where it is connected to after its state has changed. */
INLINE void complete_address(u64 sk, struct tcp_socket *t)
{
	t->family = connected_to(sk, t->address);
	bpf_probe_read_kernel(&t->port, sizeof(t->port), (void *)(sk + 12));
	t->port = __builtin_bswap16(t->port);
}

struct socket_arguments { /* of sock:sock_send_length and sock_recv_length, since Linux 6.3 */
	u64 sk;
	u64 result; /* an int: bytes, or an error */
	u64 flags;
};

SECTION("raw_tracepoint/sock_send_length") int on_socket_sent(struct socket_arguments *a)
{
	u64 sk = a->sk;
	int result = a->result;
	if (result <= 0)
		return 0;
	struct tcp_socket *t = sockets_get(&sk);
	if (!t) {
		if (result >= QUIC_BYTES_MIN)
			quic_opened(sk, result);
		return 0;
	}
	t->sent += result;
	/* What is inlined here is long: it stands here once, or the verifier gives up on it. */
	u32 is_new = t->state == SOCKET_NEW;
	if (!IS_BCC && is_new && !t->port)
		complete_address(sk, t);
	if (is_new || (!t->used_ns && (t->flags & SOCKET_FOLLOWED))) {
		struct payload p = {};
		u32 found = find_payload(&p, result) && (IS_BCC || p.length != ONE_OF_SEVERAL);
		if (is_new && !(found ? judge_socket(sk, t, &p, result) : judge_unread(sk, t)))
			return 0;
		if (found)
			follow_records(t, &p);
		else
			t->flags &= ~SOCKET_FOLLOWED;
		if (is_new && t->state == SOCKET_SEEN) {
			tell_socket(KIND_SOCKET_SEEN, sk, t);
			return 0;
		}
	}
	if (!t->linked)
		link_socket(t);
	if (!IS_BCC && is_new && t->host[0]) {
		t->state = SOCKET_SEEN;
		tell_socket(KIND_SOCKET_SEEN, sk, t);
	}
	return 0;
}

SECTION("raw_tracepoint/sock_recv_length") int on_socket_received(struct socket_arguments *a)
{
	u64 sk = a->sk;
	int result = a->result;
	/* The error queue returns what was sent, with its time stamps. */
	if (result <= 0 || (a->flags & (MSG_PEEK | MSG_ERRQUEUE)))
		return 0;
	struct tcp_socket *t = sockets_get(&sk);
	if (t)
		t->received += result;
	return 0;
}

/* The end of a thread; `last`: of its process with it. The first thread may end before the others. */
INLINE int exited(u32 last)
{
	u32 zero = 0;
	struct settings *s = settings_get(&zero);
	if (!s)
		return 0;
	u64 ids = current_ids(s), global = bpf_get_current_pid_tgid();
	u32 tgid = ids >> 32, tid = ids;
	threads_drop(&ids);
	rustls_calls_drop(&ids);
	writing_drop(&ids);
	u32 born = global;
	if (born != (u32)(global >> 32)) {
		births_drop(&born);
		born |= TREE_FORKED;
		tree_drop(&born);
		tree_drop(&tid);
	}
	if (!last)
		return 0;
	born = global >> 32;
	births_drop(&born);
	born |= TREE_FORKED;
	tree_drop(&born);
	tree_drop(&tgid);
	pausing_drop(&tgid);
	paused_drop(&tgid);
	end_connections(tgid);
	return 0;
}

/* Without the kernel's types the end of the first thread is taken for that of its process. */
SECTION("raw_tracepoint/sched_process_exit") int on_exit(void *unused)
{
	u64 ids = bpf_get_current_pid_tgid();
	return exited((u32)ids == ids >> 32);
}

#ifndef HALTON_BCC
SECTION("raw_tracepoint/sched_process_exit") int on_exit_of_last(void *unused)
{
	struct task_struct *task = current_task();
	struct signal_struct *shared = 0;
	int live = 0;

	bpf_probe_read_kernel(&shared, sizeof(shared), &task->signal);
	bpf_probe_read_kernel(&live, sizeof(live), &shared->live.counter);
	return exited(!live);
}
#endif

#ifndef HALTON_BCC
/* ---- all probes of a file at once --------------------------------------------------------------
 * A kernel since 6.6 attaches one program to any number of places in a file, in one call. It is one of
 * these two, which carry on as the program whose number the place's cookie has. bcc cannot load them. */
INLINE int carry_on(struct registers *r)
{
	bpf_tail_call(r, &file_programs, bpf_get_attach_cookie(r) >> (64 - COOKIE_PROGRAM_BITS));
	return 0;
}
SECTION("uprobe/at_entry") int at_entry(struct registers *r) { return carry_on(r); }
SECTION("uprobe/at_return") int at_return(struct registers *r) { return carry_on(r); }

char _license[] SECTION("license") = "GPL";
#endif
