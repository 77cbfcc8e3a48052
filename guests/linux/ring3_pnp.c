// SPDX-License-Identifier: GPL-2.0
/*
 * The guest's side of the page-not-present protocol (docs/features/page-not-present.md).
 *
 * The hypervisor interrupts this kernel in the place of an access to a page that is elsewhere, and interrupts it again when pages have come or are lost. What
 * is done with that:
 *
 * - A task that was in user mode sleeps before it returns there, and others have the processor. It makes its access again when the page has come.
 * - A task whose page is lost has it taken away by the kernel's own code for memory failures, as after a machine check: SIGBUS, for it alone.
 * - The kernel itself cannot sleep just anywhere. It makes its access again at once; the page has a token already, so that the hypervisor has the
 *   processor sleep until the page comes, which is what would have happened without us. If the page is lost, a copy from or to user memory ends
 *   with EFAULT; other accesses have no way out, and are a machine check, or the end of the guest.
 *
 * A processor has its own registers, data, ring and pair of interrupts, and its own tokens. Both interrupts of a token come to the processor that made the
 * access; the task may be elsewhere by then.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/cpuhotplug.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/reboot.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/task_work.h>
#include <linux/wait.h>
#include <asm/cpufeature.h>
#include <asm/hw_irq.h>
#include <asm/irq_regs.h>
#include <asm/irqdomain.h>
#include <asm/msr.h>
#include <asm/processor.h>
#include <asm/trapnr.h>

/* Enumeration. */
#define RING3_CPUID_SIGNATURE		0x40000100
#define RING3_CPUID_FEATURES		0x40000101
#define RING3_LAYOUT			1
#define RING3_FEATURE_PNP		BIT(1)

/* Registers. */
#define MSR_PNP_VECTORS			0x52330100
#define MSR_PNP_RING			0x52330101
#define MSR_PNP_DATA			0x52330102
#define PNP_DATA_ENABLED		BIT(0)
#define PNP_DATA_MC			BIT(2)

/* The ring has this many tokens: all that the hypervisor hands out at a time. */
#define RING_ORDER			6
#define TOKENS				(1U << RING_ORDER)

/* All tokens: the hypervisor does not know of them any more, for instance because the guest has been moved. */
#define TOKEN_ALL			U32_MAX

#define FLAG_GVA_KNOWN			BIT(0)

#define RESULT_FAILED			1

struct page_not_present_data {
	u32 inuse;
	u32 token;
	u64 gpa;
	u64 gva;
	u32 flags;
	u32 reserved;
} __aligned(64);

struct page_not_present_resolutions {
	struct {
		u32 result;
		u32 token;
	} events[TOKENS];
	u32 head;
	u32 tail;
} __aligned(64);

/* What is shared with the hypervisor. One page: the ring has to begin one, and neither structure may cross one. */
struct pnp_shared {
	struct page_not_present_resolutions ring;
	struct page_not_present_data data;
};
static_assert(sizeof(struct pnp_shared) <= PAGE_SIZE);
static_assert(sizeof(struct page_not_present_data) == 64);

/* A task that waits for a page. It is the task's own, and freed by it: who resolves the token touches it no more after complete(). */
struct pnp_wait {
	struct callback_head work;
	struct completion done;
	struct pnp_cpu *cpu;
	u64 gpa;
	u32 result;
};

/*
 * A token that we know of: one that was handed out and is not resolved, or (@resolved) one that is resolved and whose event has not been seen. The
 * protocol allows the resolution to be first; a page that is known to be lost comes like that.
 */
struct pnp_token {
	u32 token;		/* 0: this entry is free. */
	u32 result;
	bool resolved;
	struct pnp_wait *wait;	/* Who sleeps. Nobody does after an access of the kernel's. */
};

struct pnp_cpu {
	struct pnp_shared *shared;
	raw_spinlock_t lock;	/* Of what follows: tasks that are killed give up their wait, wherever they run. */
	/*
	 * No more than TOKENS are out. One more may be resolved early, that of an event on its way. And one may have been forgotten by the hypervisor
	 * (see broadcast) until the next TOKEN_ALL.
	 */
	struct pnp_token tokens[TOKENS + 2];
	bool broadcast;		/* TOKEN_ALL has been read while an event was on its way, whose token it may have meant. */
	bool enabled;
	int event_irq;
	int resolution_irq;
};

static DEFINE_PER_CPU(struct pnp_cpu, pnp_cpus);

/* Tasks that are to wait, wait, or have not left pnp_wait_work() yet. The module cannot go before them. */
static atomic_t pnp_waiters = ATOMIC_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(pnp_no_waiters);

static enum cpuhp_state pnp_hotplug;

/* The kernel's fixup_exception(), or NULL: see find_fixup_exception(). */
static int (*pnp_fixup_exception)(struct pt_regs *regs, int trapnr, unsigned long error_code, unsigned long fault_addr);

/* Counters, readable at /sys/module/ring3_pnp/parameters. */
static atomic_long_t events, resolutions, failed, in_kernel;

static int counter_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%ld\n", atomic_long_read((atomic_long_t *)param->arg));
}

/* insmod calls it for `events=5`. */
static int counter_set(const char *value, const struct kernel_param *param)
{
	return -EPERM;
}

static const struct kernel_param_ops counter_ops = { .get = counter_get, .set = counter_set };

#define COUNTER(name, text)					\
	module_param_cb(name, &counter_ops, &name, 0444);	\
	MODULE_PARM_DESC(name, text)

COUNTER(events, "pages that were elsewhere (read-only)");
COUNTER(resolutions, "pages that have come or are lost (read-only)");
COUNTER(failed, "pages that are lost, each time that somebody touched one (read-only)");
COUNTER(in_kernel, "events that have interrupted the kernel: the processor slept (read-only)");

/* The entry of @token; of 0, a free one. */
static struct pnp_token *find_token(struct pnp_cpu *cpu, u32 token)
{
	for (int i = 0; i < ARRAY_SIZE(cpu->tokens); i++)
		if (cpu->tokens[i].token == token)
			return &cpu->tokens[i];
	return NULL;
}

static struct pnp_token *add_token(struct pnp_cpu *cpu, u32 token)
{
	struct pnp_token *entry = find_token(cpu, 0);

	/* More tokens than the ring has. */
	if (WARN_ON_ONCE(!entry))
		return NULL;
	*entry = (struct pnp_token) { .token = token };
	return entry;
}

static void wake(struct pnp_token *entry, u32 result)
{
	struct pnp_wait *wait = entry->wait;

	if (wait) {
		wait->result = result;
		complete(&wait->done);
	}
	entry->token = 0;
}

/* Whoever waits makes the access again; if the page is still elsewhere, there is a new event. */
static void wake_all(struct pnp_cpu *cpu)
{
	for (int i = 0; i < ARRAY_SIZE(cpu->tokens); i++)
		if (cpu->tokens[i].token && !cpu->tokens[i].resolved)
			wake(&cpu->tokens[i], 0);
}

static void resolve(struct pnp_cpu *cpu, u32 token, u32 result)
{
	struct pnp_token *entry;

	if (token == TOKEN_ALL) {
		wake_all(cpu);
		cpu->broadcast = READ_ONCE(cpu->shared->data.inuse);
		return;
	}
	atomic_long_inc(&resolutions);
	if (result == RESULT_FAILED)
		atomic_long_inc(&failed);
	entry = find_token(cpu, token);
	if (entry) {
		wake(entry, result);
		return;
	}
	entry = add_token(cpu, token);
	if (entry) {
		entry->resolved = true;
		entry->result = result;
	}
}

/* Reads what is in the ring. With the lock held and interrupts off, on the processor whose ring it is. */
static void drain(struct pnp_cpu *cpu)
{
	struct page_not_present_resolutions *ring = &cpu->shared->ring;
	u32 tail = ring->tail;

	/* An entry is complete before head says that it is there, and ours until tail says that it has been read. */
	while (tail != smp_load_acquire(&ring->head)) {
		u32 result = READ_ONCE(ring->events[tail % TOKENS].result);
		u32 token = READ_ONCE(ring->events[tail % TOKENS].token);

		smp_store_release(&ring->tail, ++tail);
		resolve(cpu, token, result);
	}
}

/*
 * The page is lost, and current has touched it in user mode. The kernel's code for that unmaps the page from everybody, so that nobody gets it again, sends
 * SIGBUS (BUS_MCEERR_AR and the address) to current, and to nobody else, or finds that the page can be read again from a file.
 */
static void lose_page(u64 gpa)
{
	int error = -EOPNOTSUPP;

#ifdef CONFIG_MEMORY_FAILURE
	error = memory_failure(PHYS_PFN(gpa), MF_ACTION_REQUIRED);
	/* Somebody else has lost it before: current has got its SIGBUS. */
	if (error == -EHWPOISON)
		return;
#endif
	/* It is none of the pages that a process can be without, a page table for instance. */
	if (error)
		force_sig(SIGBUS);
}

static void put_waiter(void)
{
	if (atomic_dec_and_test(&pnp_waiters))
		wake_up(&pnp_no_waiters);
}

/*
 * Runs in the task, on its way back to user mode. The task can be killed while it waits: it will not make the access again. Other signals wait as they
 * do for any page that is read from a disk.
 */
static void pnp_wait_work(struct callback_head *work)
{
	struct pnp_wait *wait = container_of(work, struct pnp_wait, work);
	struct pnp_cpu *cpu = wait->cpu;

	if (wait_for_completion_killable(&wait->done)) {
		unsigned long flags;

		raw_spin_lock_irqsave(&cpu->lock, flags);
		for (int i = 0; i < ARRAY_SIZE(cpu->tokens); i++)
			if (cpu->tokens[i].wait == wait)
				cpu->tokens[i].wait = NULL;
		raw_spin_unlock_irqrestore(&cpu->lock, flags);
	} else if (wait->result == RESULT_FAILED) {
		lose_page(wait->gpa);
	}
	kfree(wait);
	put_waiter();
}

/* A wait for a page, of the task that was interrupted in user mode. NULL: there is no memory, and nobody will wait. */
static struct pnp_wait *new_wait(struct pnp_cpu *cpu, u64 gpa)
{
	struct pnp_wait *wait = kmalloc(sizeof(*wait), GFP_ATOMIC | __GFP_NOWARN);

	if (!wait)
		return NULL;
	init_task_work(&wait->work, pnp_wait_work);
	init_completion(&wait->done);
	wait->cpu = cpu;
	wait->gpa = gpa;
	wait->result = 0;
	return wait;
}

/*
 * The kernel has touched a page that is lost. Whatever can bear a fault there gets one: copies to and from user memory above all, whose system call then
 * fails with EFAULT. False: there is no way out.
 */
static bool lose_page_in_kernel(struct pt_regs *regs, u64 gpa, u64 gva)
{
	if (!pnp_fixup_exception || !pnp_fixup_exception(regs, X86_TRAP_PF, 0, gva))
		return false;
#ifdef CONFIG_MEMORY_FAILURE
	/* Nobody is to get it again. The task may get along without; if it touches it in user mode, it has its SIGBUS. */
	memory_failure_queue(PHYS_PFN(gpa), 0);
#endif
	return true;
}

/* The event: a page is not present. Interrupts are off, so that there is no other until we return. */
static irqreturn_t pnp_event(int irq, void *id)
{
	struct pnp_cpu *cpu = this_cpu_ptr(&pnp_cpus);
	struct page_not_present_data *data = &cpu->shared->data;
	struct pt_regs *regs = get_irq_regs();
	bool user = user_mode(regs), resolved = false, lost = false, sleeps = false;
	struct pnp_wait *wait = NULL;
	struct pnp_token *entry;
	u32 token;
	u64 gpa, gva;

	/* The rest is valid if inuse is set, and stays so until we clear it. */
	if (!cpu->enabled || !smp_load_acquire(&data->inuse))
		return IRQ_HANDLED;
	token = data->token;
	gpa = data->gpa;
	gva = data->flags & FLAG_GVA_KNOWN ? data->gva : 0;
	atomic_long_inc(&events);
	if (user)
		wait = new_wait(cpu, gpa);

	raw_spin_lock(&cpu->lock);
	/* The resolution may be there, with its interrupt behind ours. */
	drain(cpu);
	entry = find_token(cpu, token);
	if (entry) {
		resolved = true;
		lost = entry->result == RESULT_FAILED;
		entry->token = 0;
	} else {
		entry = add_token(cpu, token);
	}
	if (wait && (resolved ? lost : entry && !cpu->broadcast)) {
		sleeps = !task_work_add(current, &wait->work, TWA_RESUME);
		if (sleeps)
			atomic_inc(&pnp_waiters);
		if (sleeps && resolved) {
			/* It does not sleep, but is where the page can be taken away from it. */
			wait->result = RESULT_FAILED;
			complete(&wait->done);
		} else if (sleeps) {
			entry->wait = wait;
		}
	}
	cpu->broadcast = false;
	raw_spin_unlock(&cpu->lock);

	if (!sleeps)
		kfree(wait);
	if (lost && user && !sleeps)
		/* There was no memory. It must not touch the page again, though. */
		force_sig(SIGBUS);
	if (!user)
		atomic_long_inc(&in_kernel);
	if (lost && !user && !lose_page_in_kernel(regs, gpa, gva)) {
		/* With the data in use the next access cannot be told: it is a machine check, with PNP_DATA_MC, and the kernel's own code decides. */
		pr_err("the kernel needs page %#llx, which is lost: %pS\n", gpa, (void *)instruction_pointer(regs));
		return IRQ_HANDLED;
	}
	smp_store_release(&data->inuse, 0);
	return IRQ_HANDLED;
}

/* Tokens have been resolved. There may be none: one interrupt can stand for many, and pnp_event() reads the ring as well. */
static irqreturn_t pnp_resolution(int irq, void *id)
{
	struct pnp_cpu *cpu = this_cpu_ptr(&pnp_cpus);

	raw_spin_lock(&cpu->lock);
	if (cpu->enabled)
		drain(cpu);
	raw_spin_unlock(&cpu->lock);
	return IRQ_HANDLED;
}

/*
 * A vector of processor @cpu, with an interrupt of the kernel's behind it. No device stands behind that: the hypervisor raises the vector in
 * the local APIC. So the interrupt is one of the domain of the vectors itself, below which those of IOAPICs and MSIs are. The vector must stay
 * where it is: the mask has it allocated there, now, and IRQF_NOBALANCING keeps everybody from moving it.
 */
static int request_vector(unsigned int cpu, irq_handler_t handler, const char *name, int *irq, u8 *vector)
{
	struct irq_affinity_desc affinity = { .mask = *cpumask_of(cpu) };
	struct irq_alloc_info info = { .mask = cpumask_of(cpu) };
	struct irq_cfg *config;
	int error;

	*irq = __irq_domain_alloc_irqs(x86_vector_domain, -1, 1, cpu_to_node(cpu), &info, false, &affinity);
	if (*irq < 0) {
		error = *irq;
		*irq = 0;
		return error;
	}
	/* With it the EOI is sent before the handler runs. */
	irq_set_handler(*irq, handle_edge_irq);
	error = request_irq(*irq, handler, IRQF_NOBALANCING | IRQF_NO_THREAD, name, &pnp_cpus);
	if (error) {
		irq_dispose_mapping(*irq);
		*irq = 0;
		return error;
	}
	config = irqd_cfg(irq_get_irq_data(*irq));
	*vector = config->vector;
	return 0;
}

static void release_vector(int *irq)
{
	if (*irq) {
		free_irq(*irq, &pnp_cpus);
		irq_dispose_mapping(*irq);
	}
	*irq = 0;
}

/* After this the hypervisor resolves nothing: nobody may wait for it. On the processor itself. */
static void disable(void *unused)
{
	struct pnp_cpu *cpu = this_cpu_ptr(&pnp_cpus);
	unsigned long flags;

	raw_spin_lock_irqsave(&cpu->lock, flags);
	if (cpu->enabled) {
		wrmsrl(MSR_PNP_DATA, 0);
		cpu->enabled = false;
		drain(cpu);
		wake_all(cpu);
	}
	raw_spin_unlock_irqrestore(&cpu->lock, flags);
}

static int pnp_offline(unsigned int id)
{
	struct pnp_cpu *cpu = per_cpu_ptr(&pnp_cpus, id);

	disable(NULL);
	release_vector(&cpu->event_irq);
	release_vector(&cpu->resolution_irq);
	return 0;
}

/* On the processor itself: now, on all that are online, and on others when they come. */
static int pnp_online(unsigned int id)
{
	struct pnp_cpu *cpu = per_cpu_ptr(&pnp_cpus, id);
	phys_addr_t shared = virt_to_phys(cpu->shared);
	u8 event, resolution;
	unsigned long flags;
	int error;

	error = request_vector(id, pnp_event, "ring3_pnp event", &cpu->event_irq, &event);
	if (!error)
		error = request_vector(id, pnp_resolution, "ring3_pnp resolution", &cpu->resolution_irq, &resolution);
	if (error) {
		pnp_offline(id);
		return error;
	}
	raw_spin_lock_irqsave(&cpu->lock, flags);
	memset(cpu->shared, 0, sizeof(*cpu->shared));
	memset(cpu->tokens, 0, sizeof(cpu->tokens));
	cpu->broadcast = false;
	cpu->enabled = true;
	error = wrmsrl_safe(MSR_PNP_VECTORS, resolution << 8 | event);
	if (!error)
		error = wrmsrl_safe(MSR_PNP_RING, (shared + offsetof(struct pnp_shared, ring)) | RING_ORDER);
	if (!error)
		error = wrmsrl_safe(MSR_PNP_DATA,
				    (shared + offsetof(struct pnp_shared, data)) | PNP_DATA_MC | PNP_DATA_ENABLED);
	if (error)
		cpu->enabled = false;
	raw_spin_unlock_irqrestore(&cpu->lock, flags);
	if (error) {
		pr_err("the hypervisor does not take the registers of processor %u\n", id);
		pnp_offline(id);
		return -EIO;
	}
	return 0;
}

/* The next kernel must not find that memory of its own is our data. */
static int pnp_reboot(struct notifier_block *block, unsigned long action, void *data)
{
	on_each_cpu(disable, NULL, 1);
	return NOTIFY_DONE;
}

static struct notifier_block pnp_reboot_block = { .notifier_call = pnp_reboot };

/*
 * fixup_exception() is not exported. A kprobe knows where a function is, and this one is never armed: the way of modules outside the kernel since
 * kallsyms_lookup_name() is not exported either. What it gives is behind the function's ENDBR, where nobody can call it if the kernel enforces that
 * calls go to one; the ENDBR itself is gone then, because the kernel never takes the function's address. We can do without.
 */
static void find_fixup_exception(void)
{
	struct kprobe probe = { .symbol_name = "fixup_exception", .flags = KPROBE_FLAG_DISABLED };

	if (cpu_feature_enabled(X86_FEATURE_IBT) || register_kprobe(&probe)) {
		pr_info("system calls with pages that are lost are machine checks\n");
		return;
	}
	pnp_fixup_exception = (void *)probe.addr;
	unregister_kprobe(&probe);
}

static bool offered(void)
{
	u32 max, signature[3], features, unused;

	cpuid(RING3_CPUID_SIGNATURE, &max, &signature[0], &signature[1], &signature[2]);
	if (memcmp(signature, "ring3ring3\0\0", sizeof(signature)) || max < RING3_CPUID_FEATURES)
		return false;
	cpuid(RING3_CPUID_FEATURES, &max, &features, &unused, &unused);
	return max == RING3_LAYOUT && features & RING3_FEATURE_PNP;
}

static void free_shared(void)
{
	unsigned int id;

	for_each_possible_cpu(id)
		free_page((unsigned long)per_cpu_ptr(&pnp_cpus, id)->shared);
}

/*
 * Nobody waits any more, but some may not have run since. Then there is who has called put_waiter() and has not returned from our code: it does so
 * before it next sleeps or is in user mode, which is what synchronize_rcu_tasks() waits for.
 */
static void wait_for_waiters(void)
{
	wait_event(pnp_no_waiters, !atomic_read(&pnp_waiters));
	synchronize_rcu_tasks();
}

static int __init pnp_init(void)
{
	unsigned int id;
	int state;

	if (!offered()) {
		pr_info("not offered: this hypervisor has no page-not-present protocol\n");
		return -ENODEV;
	}
	for_each_possible_cpu(id) {
		struct pnp_cpu *cpu = per_cpu_ptr(&pnp_cpus, id);

		raw_spin_lock_init(&cpu->lock);
		cpu->shared = (void *)get_zeroed_page(GFP_KERNEL);
		if (!cpu->shared) {
			free_shared();
			return -ENOMEM;
		}
	}
	find_fixup_exception();
	state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "ring3_pnp:online", pnp_online, pnp_offline);
	if (state < 0) {
		wait_for_waiters();
		free_shared();
		return state;
	}
	pnp_hotplug = state;
	register_reboot_notifier(&pnp_reboot_block);
	pr_info("on %u processors, %u tokens each\n", num_online_cpus(), TOKENS);
	return 0;
}

static void __exit pnp_exit(void)
{
	unregister_reboot_notifier(&pnp_reboot_block);
	cpuhp_remove_state(pnp_hotplug);
	wait_for_waiters();
	free_shared();
}

module_init(pnp_init);
module_exit(pnp_exit);
MODULE_DESCRIPTION("Guest driver of ring3's page-not-present protocol");
MODULE_LICENSE("GPL");
