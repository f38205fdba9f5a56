/* Sends what passes through the places that golang.py found, for test_golang_live.py.
 * Built with -DTGID= -DCONFIG= -DNAME= for one process of the test's own. x86-64. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>

struct call {
    __u64 conn, buffer, sent;
};
struct seen {
    __u64 conn, sent;
    __s64 count;
    __u64 host_length;
    char host[64];
    char data[128];
};
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, __u64);
    __type(value, struct call);
} calls SEC(".maps");
struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 20);
} ring SEC(".maps");

static __always_inline int begin(struct pt_regs *ctx, __u64 sent) {
    if (bpf_get_current_pid_tgid() >> 32 != TGID)
        return 0;
    __u64 goroutine = ctx->r14;
    struct call call = {ctx->rax, ctx->rbx, sent};
    bpf_map_update_elem(&calls, &goroutine, &call, BPF_ANY);
    return 0;
}
SEC("uprobe") int begin_read(struct pt_regs *ctx) { return begin(ctx, 0); }
SEC("uprobe") int begin_write(struct pt_regs *ctx) { return begin(ctx, 1); }

SEC("uprobe") int finish(struct pt_regs *ctx) {
    __u64 goroutine = ctx->r14, config = 0, text = 0;
    struct call *call = bpf_map_lookup_elem(&calls, &goroutine);
    if (!call)
        return 0;
    struct seen *seen = bpf_ringbuf_reserve(&ring, sizeof(*seen), 0);
    if (!seen)
        return 0;
    seen->conn = call->conn;
    seen->sent = call->sent;
    seen->count = ctx->rax;
    bpf_probe_read_user(&config, 8, (void *)(call->conn + CONFIG));
    bpf_probe_read_user(&text, 8, (void *)(config + NAME));
    bpf_probe_read_user(&seen->host_length, 8, (void *)(config + NAME + 8));
    bpf_probe_read_user(seen->host, sizeof(seen->host), (void *)text);
    bpf_probe_read_user(seen->data, sizeof(seen->data), (void *)call->buffer);
    bpf_ringbuf_submit(seen, 0);
    bpf_map_delete_elem(&calls, &goroutine);
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
