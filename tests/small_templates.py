"""Short chat templates that behave as those of well-known models do, where they differ from ChatML."""

_CALLS_AS_JSON = "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}"

# As DeepSeek-R1-Distill: the prompt opens a thought; thoughts are stripped from contents; calls need content null.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% elif m.role == 'tool' %}"
    "{{ '<|tool|>' + m.content }}{% elif m.content is none %}{{ '<|pad|>' }}{% for c in m.tool_calls %}"
    + _CALLS_AS_JSON
    + "{% endfor %}{{ '<|im_end|>' }}{% else %}{{ '<|pad|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|pad|><think>\\n' }}{% endif %}"
)
# As GPT-OSS: channels; the analysis of earlier turns is dropped once a final answer follows; one call in a turn.
GPT_OSS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.index0 > ns.last or loop.last and not add_generation_prompt) %}"
    "{{ '<|im_start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{{ '<|im_start|>assistant to=' + f.name + "
    "'<|channel|>commentary<|message|>' + f.arguments | tojson + '<|call|>' }}{% else %}"
    "{{ '<|im_start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% endif %}{% else %}{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# As Mistral v3: calls are one JSON list, ids have 9 characters, tools are before the last turn of the user.
MISTRAL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ '[RESULT]' + m.content + m.tool_call_id + '[/RESULT]' }}{% elif m.tool_calls %}{{ '[CALLS][' }}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ c.function | tojson + ('' if loop.last else ', ') }}{% endfor %}{{ ']' + eos_token }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# As Llama 3.1: tools are in the first turn of the user; one call in a turn, without text.
LLAMA31 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if tools and loop.first %}{{ tools | tojson }}"
    "{% endif %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}"
    '{% endif %}{% set f = m.tool_calls[0].function %}{{ \'{"name": "\' + f.name + \'", "parameters": \' + '
    "f.arguments | tojson + '}' }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3: thoughts of earlier rounds are dropped; the last answer has a thought, which may be empty.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
# As Phi-3: EOS follows the token that ends the last turn.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
# As models for images: contents are lists of parts.
PARTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As GLM-4: no token ends a turn but the one that begins the next.
GLM4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL = ["<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL += ["[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]", "[RESULT]", "[/RESULT]"]
