// SPDX-License-Identifier: GPL-2.0
/*
 * Linux guest driver of the page-not-present protocol (docs/features/page-not-present.md).
 *
 * A task that touches a page which the host has elsewhere sleeps until the page comes, and the processor does something else. A task whose
 * page turns out to be lost gets SIGBUS; nobody else notices.
 *
 * The event is an ordinary interrupt that comes in the place of an access. Two cases:
 *
 *  - It has interrupted user mode. The task is made to sleep before it returns there, by a task work. When it goes on it makes the access
 *    again.
 *  - It has interrupted the kernel, which may hold locks. Nothing is done: the access is made again when the handler returns, and since its
 *    page has got a token already the host lets the processor sleep until the page comes, with interrupts if they are on. (tglx in the thread: the
 *    guest decides by its own state.)
 *
 * NMIs, and code that runs with interrupts off, never see the event, for it is an interrupt.
 *
 * Processors that come after the module was loaded are without.
 */
#define pr_fmt(fmt) "ring3_pnp: " fmt

#include <linux/cpu.h>
#include <linux/hashtable.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/swait.h>
#include <linux/task_work.h>
#include <asm/hw_irq.h>
#include <asm/irq_regs.h>
#include <asm/irqdomain.h>
#include <asm/msr.h>
#include <asm/processor.h>

#define CPUID_SIGNATURE	0x40000100
#define CPUID_FEATURES	0x40000101
#define LAYOUT_VERSION	1
#define FEATURE_PNP	BIT(1)

#define MSR_PNP_VECTORS	0x52330100
#define MSR_PNP_RING	0x52330101
#define MSR_PNP_DATA	0x52330102
#define PNP_ENABLED	BIT_ULL(0)
#define PNP_MC		BIT_ULL(2)	/* #MC, which Linux knows how to handle, rather than be killed */

#define ORDER		8
#define TOKENS		BIT(ORDER)
#define TOKEN_ALL	(~0u)

struct page_not_present_data {
	u32 inuse;
	u32 token;
	u64 gpa;
	u64 gva;
	u32 flags;
	u32 reserved;
};
#define GVA_KNOWN	BIT(0)

struct page_not_present_resolutions {
	struct {
		u32 result;
		u32 token;
	} events[TOKENS];
	u32 head, tail;
};

/* A token that the host has given, or has resolved before we have heard of it. */
struct token {
	struct hlist_node node;
	u32 token;
	u32 result;
	bool done;
	bool nobody;			/* nobody sleeps for it */
	unsigned long address;
	unsigned long pfn;
	struct swait_queue_head sleeper;
	struct callback_head work;
};

/* What a processor shares with the host. */
struct shared {
	struct page_not_present_data *data;
	struct page_not_present_resolutions *ring;
	int event, resolved;		/* irqs, 0: none */
	u32 vectors;
};

static DEFINE_PER_CPU(struct shared, shared);

static DEFINE_HASHTABLE(tokens, 6);
static DEFINE_RAW_SPINLOCK(lock);	/* of the table; taken in interrupts */
static atomic_t asleep;			/* tasks that have our work to do */
static DECLARE_WAIT_QUEUE_HEAD(all_awake);

/* Read by tests: /sys/module/ring3_pnp/parameters. */
static unsigned long events, resolutions, failures, in_kernel;
module_param(events, ulong, 0444);
MODULE_PARM_DESC(events, "pages that the host said are elsewhere");
module_param(resolutions, ulong, 0444);
MODULE_PARM_DESC(resolutions, "of which it said what has become");
module_param(failures, ulong, 0444);
MODULE_PARM_DESC(failures, "which were lost");
module_param(in_kernel, ulong, 0444);
MODULE_PARM_DESC(in_kernel, "events in the kernel, where nobody can sleep");

static struct token *find(u32 number)
{
	struct token *token;

	hash_for_each_possible(tokens, token, node, number)
		if (token->token == number)
			return token;
	return NULL;
}

static struct token *add(u32 number)
{
	struct token *token = kzalloc(sizeof(*token), GFP_ATOMIC);

	if (token) {
		token->token = number;
		init_swait_queue_head(&token->sleeper);
		hash_add(tokens, &token->node, number);
	}
	return token;
}

static void discard(struct token *token)
{
	hash_del(&token->node);
	kfree(token);
}

/*
 * The task's page is lost. The kernel does what it does where a machine check says so: it takes the page out of use, for nobody else may
 * get it, and sends SIGBUS to whoever has it mapped, with the address.
 */
static void lose(unsigned long pfn, unsigned long address)
{
	if (memory_failure(pfn, MF_ACTION_REQUIRED))
		send_sig_mceerr(BUS_MCEERR_AR, (void __user *)address, PAGE_SHIFT, current);
}

/* In the task whose access it was, on its way to user mode. */
static void sleep_until_resolved(struct callback_head *work)
{
	struct token *token = container_of(work, struct token, work);
	DECLARE_SWAITQUEUE(wait);
	unsigned long flags;
	bool failed;

	for (;;) {
		prepare_to_swait_exclusive(&token->sleeper, &wait, TASK_UNINTERRUPTIBLE);
		if (smp_load_acquire(&token->done))
			break;
		schedule();
	}
	finish_swait(&token->sleeper, &wait);
	raw_spin_lock_irqsave(&lock, flags);
	failed = token->result;
	failures += failed;
	hash_del(&token->node);
	raw_spin_unlock_irqrestore(&lock, flags);
	if (failed)
		lose(token->pfn, token->address);
	kfree(token);
	if (atomic_dec_and_test(&asleep))
		wake_up(&all_awake);
}

static irqreturn_t on_event(int irq, void *unused)
{
	struct page_not_present_data *data = this_cpu_ptr(&shared)->data;
	bool user = user_mode(get_irq_regs());
	struct token *token;
	unsigned long address, pfn;
	u32 number;

	if (!smp_load_acquire(&data->inuse))
		return IRQ_NONE;
	number = data->token;
	address = data->flags & GVA_KNOWN ? data->gva : 0;
	pfn = data->gpa >> PAGE_SHIFT;
	/* All is read: the host may write again. */
	smp_store_release(&data->inuse, 0);

	raw_spin_lock(&lock);
	events++;
	in_kernel += !user;
	token = find(number);
	if (token && !token->result) {
		/* It came before we have heard that it had gone. */
		discard(token);
		raw_spin_unlock(&lock);
		return IRQ_HANDLED;
	}
	/* One that is known to be lost already is resolved, too: the task hears of that on its way to user mode. */
	if (!token)
		token = add(number);
	/* Without memory nobody sleeps but the processor. */
	if (token) {
		token->address = address;
		token->pfn = pfn;
		token->nobody = true;
		if (user) {
			init_task_work(&token->work, sleep_until_resolved);
			if (!task_work_add(current, &token->work, TWA_RESUME)) {
				token->nobody = false;
				atomic_inc(&asleep);
			}
		}
		if (token->nobody && token->done)
			discard(token);
	}
	raw_spin_unlock(&lock);
	return IRQ_HANDLED;
}

static void resolve(struct token *token, u32 result)
{
	token->result = result;
	smp_store_release(&token->done, true);
	swake_up_one(&token->sleeper);
}

static irqreturn_t on_resolved(int irq, void *unused)
{
	struct page_not_present_resolutions *ring = this_cpu_ptr(&shared)->ring;
	struct hlist_node *next;
	struct token *token;
	u32 tail, number, result;
	int bucket;

	raw_spin_lock(&lock);
	for (tail = ring->tail; tail != smp_load_acquire(&ring->head); tail++) {
		number = ring->events[tail % TOKENS].token;
		result = ring->events[tail % TOKENS].result;
		/* The entry is read: the host may write another one in its place. */
		smp_store_release(&ring->tail, tail + 1);
		if (number == TOKEN_ALL) {
			/* We have been restored: whoever waits tries again. */
			hash_for_each_safe(tokens, bucket, next, token, node) {
				if (token->nobody)
					discard(token);
				else
					resolve(token, 0);
			}
			continue;
		}
		resolutions++;
		token = find(number);
		if (!token) {
			/* Its event is still to come. */
			token = add(number);
			if (token) {
				token->nobody = token->done = true;
				token->result = result;
			}
		} else if (token->nobody) {
			discard(token);
		} else {
			resolve(token, result);
		}
	}
	raw_spin_unlock(&lock);
	return IRQ_HANDLED;
}

/* An interrupt that nobody but the host sends: a vector of this processor's, without any other controller in front of it. */
static int allocate(unsigned int cpu, irq_handler_t handler, const char *name, u8 *vector)
{
	struct irq_alloc_info info = { .mask = cpumask_of(cpu) };
	int irq = irq_domain_alloc_irqs(x86_vector_domain, 1, cpu_to_node(cpu), &info);
	int error;

	if (irq < 0)
		return irq;
	irq_set_handler(irq, handle_edge_irq);
	error = request_irq(irq, handler, IRQF_NOBALANCING | IRQF_NO_THREAD, name, &shared);
	if (error) {
		irq_dispose_mapping(irq);
		return error;
	}
	*vector = irqd_cfg(irq_get_irq_data(irq))->vector;
	return irq;
}

static void deallocate(int irq)
{
	if (irq > 0) {
		free_irq(irq, &shared);
		irq_dispose_mapping(irq);
	}
}

static void enable(void *result)
{
	struct shared *mine = this_cpu_ptr(&shared);
	int error = wrmsrl_safe(MSR_PNP_VECTORS, mine->vectors);

	if (!error)
		error = wrmsrl_safe(MSR_PNP_RING, __pa(mine->ring) | ORDER);
	if (!error)
		error = wrmsrl_safe(MSR_PNP_DATA, __pa(mine->data) | PNP_ENABLED | PNP_MC);
	*(int *)result = error;
}

static void disable(void *unused)
{
	wrmsrl_safe(MSR_PNP_DATA, 0);
}

static int set_up(unsigned int cpu)
{
	struct shared *its = per_cpu_ptr(&shared, cpu);
	u8 event, resolved;
	int error;

	its->data = (void *)get_zeroed_page(GFP_KERNEL);
	its->ring = (void *)get_zeroed_page(GFP_KERNEL);
	if (!its->data || !its->ring)
		return -ENOMEM;
	its->event = allocate(cpu, on_event, "page not present", &event);
	if (its->event < 0)
		return its->event;
	its->resolved = allocate(cpu, on_resolved, "page resolved", &resolved);
	if (its->resolved < 0)
		return its->resolved;
	its->vectors = resolved << 8 | event;
	smp_call_function_single(cpu, enable, &error, true);
	return error;
}

static void tear_down(unsigned int cpu)
{
	struct shared *its = per_cpu_ptr(&shared, cpu);

	smp_call_function_single(cpu, disable, NULL, true);
	deallocate(its->event);
	deallocate(its->resolved);
	free_page((unsigned long)its->data);
	free_page((unsigned long)its->ring);
	memset(its, 0, sizeof(*its));
}

static bool offered(void)
{
	u32 eax, signature[3];

	if (!boot_cpu_has(X86_FEATURE_HYPERVISOR))
		return false;
	cpuid(CPUID_SIGNATURE, &eax, &signature[0], &signature[1], &signature[2]);
	if (memcmp(signature, "ring3ring3\0", sizeof(signature)))
		return false;
	return cpuid_eax(CPUID_FEATURES) == LAYOUT_VERSION && cpuid_ebx(CPUID_FEATURES) & FEATURE_PNP;
}

static void stop(void)
{
	struct hlist_node *next;
	struct token *token;
	unsigned long flags;
	unsigned int cpu;
	int bucket;

	for_each_online_cpu(cpu)
		tear_down(cpu);
	/* Nobody resolves what is left: whoever waits makes the access again, and waits as without us. */
	raw_spin_lock_irqsave(&lock, flags);
	hash_for_each_safe(tokens, bucket, next, token, node) {
		if (token->nobody)
			discard(token);
		else
			resolve(token, 0);
	}
	raw_spin_unlock_irqrestore(&lock, flags);
	wait_event(all_awake, !atomic_read(&asleep));
}

static int __init ring3_pnp_init(void)
{
	unsigned int cpu;
	int error = 0;

	BUILD_BUG_ON(sizeof(struct page_not_present_resolutions) > PAGE_SIZE);
	if (!offered()) {
		pr_info("not offered by the hypervisor\n");
		return -ENODEV;
	}
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		error = set_up(cpu);
		if (error)
			break;
	}
	if (error)
		stop();
	cpus_read_unlock();
	if (!error)
		pr_info("enabled on %u processors\n", num_online_cpus());
	return error;
}

static void __exit ring3_pnp_exit(void)
{
	cpus_read_lock();
	stop();
	cpus_read_unlock();
}

module_init(ring3_pnp_init);
module_exit(ring3_pnp_exit);
MODULE_DESCRIPTION("Pages that the host has elsewhere: the page-not-present protocol");
MODULE_LICENSE("GPL");
