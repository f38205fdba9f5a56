/* Sends what passes aws-lc's EVP_AEAD_CTX_seal and _open, for test_rustls_witness.py: plaintext with
 * TLS 1.3's type behind it. Built with -DTGID= for one process of the test's own. x86-64. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>

#define ROOM 16640

struct call {
    __u64 out, out_length;
};
struct seen {
    __u64 sealed, length;
    char data[ROOM];
};
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, __u64);
    __type(value, struct call);
} calls SEC(".maps");
struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 24);
} ring SEC(".maps");

static __always_inline __u64 stacked(struct pt_regs *ctx, int number) {
    __u64 value = 0;
    bpf_probe_read_user(&value, sizeof(value), (void *)(ctx->rsp + 8 * number));
    return value;
}

/* Additional data of 5 bytes that begins as a TLS 1.3 record does: others use these functions, too. */
static __always_inline int is_record(struct pt_regs *ctx) {
    unsigned char head[3] = {};
    if (bpf_get_current_pid_tgid() >> 32 != TGID || stacked(ctx, 4) != 5)
        return 0;
    bpf_probe_read_user(head, sizeof(head), (void *)stacked(ctx, 3));
    return head[0] == 0x17 && head[1] == 3 && head[2] == 3;
}

static __always_inline int send(__u64 sealed, __u64 address, __u64 length) {
    struct seen *seen = bpf_ringbuf_reserve(&ring, sizeof(*seen), 0);
    if (!seen)
        return 0;
    seen->sealed = sealed;
    seen->length = length;
    if (length > ROOM)
        length = ROOM;
    if (bpf_probe_read_user(seen->data, length, (void *)address))
        seen->length = 0;
    bpf_ringbuf_submit(seen, 0);
    return 0;
}

SEC("uprobe/seal") int seal(struct pt_regs *ctx) {
    return is_record(ctx) ? send(1, stacked(ctx, 1), stacked(ctx, 2)) : 0;
}

SEC("uprobe/begin_open") int begin_open(struct pt_regs *ctx) {
    __u64 id = bpf_get_current_pid_tgid();
    struct call call = {.out = ctx->rsi, .out_length = ctx->rdx};
    if (is_record(ctx))
        bpf_map_update_elem(&calls, &id, &call, BPF_ANY);
    return 0;
}

SEC("uprobe/opened") int opened(struct pt_regs *ctx) {
    __u64 id = bpf_get_current_pid_tgid(), length = 0;
    struct call *call = bpf_map_lookup_elem(&calls, &id);
    if (!call)
        return 0;
    __u64 out = call->out;
    bpf_probe_read_user(&length, sizeof(length), (void *)call->out_length);
    bpf_map_delete_elem(&calls, &id);
    return (int)ctx->rax == 1 ? send(0, out, length) : 0;
}

char _license[] SEC("license") = "GPL";
